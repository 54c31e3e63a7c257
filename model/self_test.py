"""Start-up proof, on this machine and for this model's shapes, that a row's bits do not depend on its neighbours.

BLAS libraries differ by processor, version and thread count in how a product's shape moves its rounding. A worker that
could answer a token differently beside other tokens must not join the cluster (DESIGN law 5); it says so here, in about
a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..kernels.quant import BLOCK, BlockFp8, quantise
from .config import ModelConfig
from .kv_cache import BLOCK_SIZE
from .ops import Ops, Weight
from .tensor_names import expert_tensors, is_quantised_in_fp8, layer_tensors

NUM_ROWS = 40
SLICES = ((0, 1), (39, 40), (1, 3), (2, 5), (3, 7), (4, 9), (0, 11), (7, 15), (5, 38))
GPU_WEIGHT = 1 << 27  # numbers: there a matrix's outputs decide how its depth is cut
GPU_ROWS = 300  # several of a GPU's tiles, which hold up to 128
GPU_SLICES = (*SLICES, (20, 90), (3, 130), (50, 300))
MAX_WEIGHT = 1 << 19  # numbers; of a larger matrix some output columns are tested: rounding goes along its depth
MAX_HEADS = 8
NUM_EXPERTS = 3


class SelfTestError(RuntimeError):
    """This machine computes a row differently beside other rows: do not serve on it."""


Random = Callable[..., Tensor]


@torch.inference_mode()
def self_test(
    config: ModelConfig, dtype: torch.dtype, ops: Ops, role: Literal["attention", "experts"] = "attention"
) -> None:
    """Raises SelfTestError that names the kernel and the shape."""
    generator = torch.Generator(ops.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=ops.device).to(dtype)

    _test_linear(config, role, ops, random)
    if role == "attention":
        _test_row_kernels(config, ops, random)
        _test_heads(config, ops, random)
        _test_attention(config, ops, random)
    if config.n_routed_experts is not None:
        _test_grouped_mlp(config, ops, random)


def _num_rows(ops: Ops) -> int:
    return NUM_ROWS if ops.device.type == "cpu" else GPU_ROWS


def _max_weight(ops: Ops) -> int:
    return MAX_WEIGHT if ops.device.type == "cpu" else GPU_WEIGHT


def _test_slices(kernel: str, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
    """`compute` works row by row."""
    _test_parts(kernel, "rows", len(rows), lambda first, last: compute(rows[first:last]))


def _test_parts(kernel: str, what: str, num_rows: int, compute: Callable[[int, int], Tensor]) -> None:
    whole = compute(0, num_rows)
    for first, last in SLICES if num_rows == NUM_ROWS else GPU_SLICES:
        _compare(kernel, f"{last - first} {what} of {num_rows}", compute(first, last), whole[first:last])


def _as_stored(ops: Ops, is_fp8: bool, weight: Tensor, num_joined: int = 1) -> Weight:
    """weight: [N, K], of so many matrices of one size; in fp8 where a checkpoint has it so and the family keeps it."""
    if not (is_fp8 and ops.keeps_fp8([weight.shape[0] // num_joined] * num_joined, weight.shape[1])):
        return weight
    return BlockFp8(*quantise(weight))


def _test_linear(config: ModelConfig, role: str, ops: Ops, random: Random) -> None:
    moe_layer = config.num_hidden_layers - 1
    tensors = expert_tensors(config, moe_layer, (0,))
    if role == "attention":
        tensors = {**tensors, **layer_tensors(config, 0), **layer_tensors(config, moe_layer)}
        tensors["lm_head"] = (config.vocab_size, config.hidden_size)
        queries = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
        tensors["qkv_a_proj.weight"] = (queries + config.latent_dim, config.hidden_size)
    matrices = {(*shape, is_quantised_in_fp8(name)) for name, shape in tensors.items() if len(shape) == 2}
    for outputs, inputs, is_fp8 in sorted(matrices):
        weight = _as_stored(ops, is_fp8, random(max(min(outputs, _max_weight(ops) // inputs), 1), inputs))
        multiply = partial(ops.linear, weight=ops.pack(weight))
        _test_slices(f"linear [{outputs}, {inputs}]", random(_num_rows(ops), inputs), multiply)


def _test_row_kernels(config: ModelConfig, ops: Ops, random: Random) -> None:
    hidden, inner = config.hidden_size, config.moe_intermediate_size or config.intermediate_size
    x = random(_num_rows(ops), hidden)
    if config.n_routed_experts is not None:
        gate = ops.pack_gate(random(config.n_routed_experts, hidden))
        _test_slices("gate", x, partial(ops.wide_linear, weight=gate))
    norm = partial(ops.rms_norm, weight=random(hidden), eps=config.rms_norm_eps)
    _test_slices("rms_norm", x, norm)
    w13 = _as_stored(ops, True, random(2 * inner, hidden), 2)
    w2 = _as_stored(ops, isinstance(w13, BlockFp8), random(hidden, inner))
    mlp = partial(ops.swiglu_mlp, w13=ops.pack(w13, is_gate_up=True), w2=ops.pack(w2))
    _test_slices("swiglu_mlp", x, mlp)


def _test_heads(config: ModelConfig, ops: Ops, random: Random) -> None:
    """Both absorbed projections."""
    heads = min(config.num_attention_heads, MAX_HEADS)
    for inputs, outputs in (
        (config.qk_nope_head_dim, config.kv_lora_rank),
        (config.kv_lora_rank, config.v_head_dim),
    ):
        weights = ops.pack_heads(random(heads, outputs, inputs))
        project = partial(ops.head_linear, weights=weights)
        _test_slices(f"head_linear [{outputs}, {inputs}]", random(_num_rows(ops), heads, inputs), project)


def _test_attention(config: ModelConfig, ops: Ops, random: Random) -> None:
    """A sequence a little longer than one split, whole and in parts, in both forms, with unwritten rows poisoned."""
    heads, num_rows = config.num_attention_heads, _num_rows(ops)
    if ops.device.type == "cpu":  # a GPU's tiles are of heads and rows, so that their number decides which kernel runs
        heads = min(heads, MAX_HEADS)
    length = max(ops.kv_split, num_rows) + 9
    blocks = torch.arange(length // BLOCK_SIZE, -1, -1)
    cache = random(len(blocks), BLOCK_SIZE, config.latent_dim)
    cache[int(blocks[-1]), length % BLOCK_SIZE :] = float("nan")
    blocks = blocks.to(ops.device)
    scale, value_dim, lora = config.softmax_scale, config.v_head_dim, config.kv_lora_rank
    kv_b_proj = ops.pack(random(heads * (config.qk_nope_head_dim + value_dim), lora))
    start = length - num_rows
    q = random(num_rows, heads, config.qk_head_dim)

    def prefill(first: int, last: int) -> Tensor:
        plan = ops.plan_prefill(start + first, last - first, blocks)
        return ops.mla_prefill(q[first:last], cache, kv_b_proj, plan, scale, value_dim)

    absorbed = random(num_rows, heads, config.latent_dim)

    def decode(first: int, last: int) -> Tensor:
        positions = torch.arange(start + first, start + last).to(ops.device)
        tables, firsts = blocks.repeat(len(positions), 1), torch.zeros_like(positions)
        plan = ops.plan_decode(positions, tables, firsts, heads, config.latent_dim)
        return ops.mla_decode(absorbed[first:last], cache, plan, scale, lora)

    _test_parts(f"mla_prefill {heads} heads", "rows", num_rows, prefill)
    _test_parts(f"mla_decode {heads} heads", "rows", num_rows, decode)


def _test_grouped_mlp(config: ModelConfig, ops: Ops, random: Random) -> None:
    hidden, num_rows = config.hidden_size, _num_rows(ops)
    inner = min(config.moe_intermediate_size, max(_max_weight(ops) // hidden // BLOCK[0], 1) * BLOCK[0])
    w13 = [_as_stored(ops, True, random(2 * inner, hidden), 2) for _ in range(NUM_EXPERTS)]
    w2 = [_as_stored(ops, isinstance(w13[0], BlockFp8), random(hidden, inner)) for _ in range(NUM_EXPERTS)]
    stacks = ops.pack_experts(_stacked(w13), is_gate_up=True), ops.pack_experts(_stacked(w2))
    x, pairs = random(num_rows, hidden), torch.arange(num_rows)
    rows, experts = pairs.to(ops.device), (pairs * 7 % NUM_EXPERTS).to(ops.device)

    def compute(first: int, last: int) -> Tensor:
        return ops.grouped_mlp(x, rows[first:last], experts[first:last], *stacks)

    _test_parts(f"grouped_mlp [{2 * inner}, {hidden}]", "pairs", num_rows, compute)


def _stacked(matrices: list[Weight]) -> Weight:
    floats = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    if floats:
        return torch.stack(floats)
    codes, scales = zip(*matrices, strict=True)
    return BlockFp8(torch.stack(codes), torch.stack(scales))


def _compare(kernel: str, case: str, part: Tensor, whole: Tensor) -> None:
    if not torch.equal(part, whole):
        raise SelfTestError(
            f"{kernel} in {part.dtype} rounds a row otherwise among {case} (threads: {torch.get_num_threads()}): "
            "answers would depend on the batch. Set cpus: 1 for these workers, or leave this machine out"
        )
