"""Loads from a checkpoint what one role needs, straight into the tensors that stay, on the family's device."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from ..kernels.quant import BlockFp8
from .checkpoint import Checkpoint
from .config import ModelConfig
from .network_weights import PLAIN, AttentionWeights, ExpertWeights, build_attention_weights
from .ops import Ops, Weight
from .safetensors_file import TensorSpec
from .tensor_names import Role, expected_tensors, expert_tensors, mtp_copies

Progress = Callable[[int, int], None]  # bytes of weights in place, bytes to load
Part = tuple[str, Weight]  # a tensor's name and the slice of a stack that it fills


def load_attention(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Progress | None = None,
    has_mtp: bool = False,
    ops: Ops = PLAIN,
) -> AttentionWeights:
    """Everything but the routed experts, packed for `ops`; MTP modules, less their experts, if asked for and present.

    A module's embedding and head are copies of the main ones, which serve for both: neither is read nor held twice.
    Each matrix is packed as soon as it is read, so that not more than one is held twice.
    """
    roles: tuple[Role, ...] = ("attention", "mtp") if has_mtp else ("attention",)
    checkpoint.check(config, roles)
    wanted = _attention_names(checkpoint, config, roles)
    meter = _Meter(sum(_num_elements(checkpoint, name) for name in wanted), dtype, progress)

    def read(*names: str) -> Weight:
        specs = [checkpoint.spec(name) for name in names]
        whole, start = _empty(specs, dtype, ops), 0
        for spec in specs:
            end = start + spec.shape[0]
            part = whole.rows(start, end) if isinstance(whole, BlockFp8) else whole[start:end]
            _read_into(checkpoint, spec.name, part, meter)
            start = end
        return whole

    return build_attention_weights(config, read, wanted.__contains__, ops)


def load_experts(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layers: Collection[int],
    expert_ids: Collection[int],
    dtype: torch.dtype,
    progress: Progress | None = None,
    ops: Ops = PLAIN,
) -> dict[int, ExpertWeights]:
    """These experts of these layers, packed for `ops`; dense layers are passed over. Reads in the files' order."""
    _check_expert_ids(config, expert_ids)
    has_mtp = any(layer >= config.num_hidden_layers for layer in layers)
    roles: tuple[Role, ...] = ("experts", "mtp") if has_mtp else ("experts",)
    checkpoint.check(config, roles)
    ids = tuple(expert_ids)
    stacks = {
        layer: _empty_stacks(checkpoint, config, layer, ids, dtype, ops)
        for layer in sorted(layers)
        if config.is_moe_layer(layer)
    }
    parts = [part for layer, stack in stacks.items() for part in _parts(config, layer, ids, *stack)]
    parts.sort(key=lambda part: (checkpoint.spec(part[0]).path, checkpoint.spec(part[0]).begin))
    meter = _Meter(sum(_num_elements(checkpoint, name) for name, _ in parts), dtype, progress)
    for name, out in parts:
        _read_into(checkpoint, name, out, meter)
    parts.clear()  # views; without them each stack goes as soon as it is packed
    return {layer: _packed(*stacks.pop(layer), ids, ops) for layer in list(stacks)}


def _empty(specs: list[TensorSpec], dtype: torch.dtype, ops: Ops) -> Weight:
    """Room for these tensors, one below the other: as they are stored where all are fp8 and the family keeps that."""
    num_rows = sum(spec.shape[0] for spec in specs)
    if _stays_fp8(specs, ops):
        return BlockFp8.empty(num_rows, specs[0].shape[1], device=ops.device)
    # The one tensor that stays fp32: it decides which expert wins, by differences smaller than a bfloat16 step.
    wide = specs[0].name.endswith("e_score_correction_bias")
    shape = num_rows, *specs[0].row_shape
    return torch.empty(shape, dtype=torch.float32 if wide else dtype, device=ops.device)


def _read_into(checkpoint: Checkpoint, name: str, out: Weight, meter: _Meter) -> None:
    if isinstance(out, BlockFp8):
        checkpoint.read_fp8_into(name, out)
    else:
        checkpoint.read_into(name, out)
    meter.add(_num_elements(checkpoint, name))


def _stays_fp8(specs: list[TensorSpec], ops: Ops) -> bool:
    is_fp8 = all(spec.dtype == "F8_E4M3" for spec in specs)
    return is_fp8 and ops.keeps_fp8([spec.shape[0] for spec in specs], specs[0].shape[1])


def _packed(w13: Weight, w2: Weight, ids: tuple[int, ...], ops: Ops) -> ExpertWeights:
    return ExpertWeights(ops.pack_experts(w13, is_gate_up=True), ops.pack_experts(w2), ids, ops)


class _Meter:
    def __init__(self, num_elements: int, dtype: torch.dtype, progress: Progress | None) -> None:
        self._itemsize = dtype.itemsize
        self._total = num_elements * dtype.itemsize
        self._done = 0
        self._progress = progress
        self.add(0)

    def add(self, num_elements: int) -> None:
        self._done += num_elements * self._itemsize
        if self._progress is not None:
            self._progress(self._done, self._total)


def _num_elements(checkpoint: Checkpoint, name: str) -> int:
    return torch.Size(checkpoint.spec(name).shape).numel()


def _attention_names(checkpoint: Checkpoint, config: ModelConfig, roles: tuple[Role, ...]) -> frozenset[str]:
    # Whole modules may be absent; `check` has seen to the rest.
    names = {name for name in expected_tensors(config, roles) if ".mlp.experts." not in name and checkpoint.has(name)}
    return frozenset(names - mtp_copies(config))


def _check_expert_ids(config: ModelConfig, expert_ids: Collection[int]) -> None:
    num_experts = config.n_routed_experts or 0
    wrong = [expert for expert in expert_ids if not 0 <= expert < num_experts]
    if wrong or len(set(expert_ids)) != len(expert_ids):
        raise ValueError(f"expert ids {list(expert_ids)} must be different and lie in 0..{num_experts - 1}")


def _empty_stacks(
    checkpoint: Checkpoint, config: ModelConfig, layer: int, ids: tuple[int, ...], dtype: torch.dtype, ops: Ops
) -> tuple[Weight, Weight]:
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    specs = [checkpoint.spec(name) for name in expert_tensors(config, layer, ids)]
    is_fp8 = all(spec.dtype == "F8_E4M3" for spec in specs)

    stays_fp8 = is_fp8 and ops.keeps_fp8((intermediate, intermediate), hidden)

    def empty(rows: int, columns: int) -> Weight:
        if stays_fp8:
            return BlockFp8.empty(len(ids), rows, columns, device=ops.device)
        return torch.empty(len(ids), rows, columns, dtype=dtype, device=ops.device)

    return empty(2 * intermediate, hidden), empty(hidden, intermediate)


def _parts(config: ModelConfig, layer: int, ids: tuple[int, ...], w13: Weight, w2: Weight) -> list[Part]:
    parts: list[Part] = []
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    for place, expert in enumerate(ids):
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        parts.append((prefix + "gate_proj.weight", _matrix(w13, place, 0, intermediate)))
        parts.append((prefix + "up_proj.weight", _matrix(w13, place, intermediate, 2 * intermediate)))
        parts.append((prefix + "down_proj.weight", _matrix(w2, place, 0, hidden)))
    return parts


def _matrix(stack: Weight, place: int, start: int, stop: int) -> Weight:
    """These rows of one matrix of a stack."""
    if isinstance(stack, BlockFp8):
        return BlockFp8(stack.codes[place], stack.scales[place]).rows(start, stop)
    return stack[place, start:stop]
