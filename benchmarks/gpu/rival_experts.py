"""The products of an expert worker by vLLM's Triton kernel and by DeepGEMM, on the operands that ours get.

Ours is timed whole: rows gathered, w13, SwiGLU, quantisation, w2. Theirs is timed in its favour: rows already laid out
as it wants them, and the two products alone, the second one of rows that were made from the first's beforehand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from braid.kernels.gpu import experts, index, norm
from braid.kernels.gpu.norm import Quantised
from braid.kernels.gpu.scales import GROUP
from braid.model.config import ModelConfig

from .cases import Draw
from .cases_experts import chosen, expert_work
from .rival_kernels import Contest, extracted, imported, taking_turns

MASKED_ROWS = (
    512  # up to here DeepGEMM's layout of decode, a fixed number of rows an expert, and from here on its other
)
ALIGNMENT = 128  # rows that DeepGEMM's tiles never exceed


@dataclass(frozen=True, slots=True)
class Operands:
    """`x`: rows [n, H]; `expert_of_pair`: int64 [P], -1 elsewhere; weights as grouped_mlp_fp8 takes them."""

    x: Quantised
    slots: int
    expert_of_pair: Tensor
    held: int
    w13: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]

    @classmethod
    def drawn(cls, draw: Draw, config: ModelConfig, rows: int, held: int) -> Operands:
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        x, places = draw.activations(rows, hidden), chosen(draw, config, rows, held)
        w13, w2 = draw.block_weight(2 * inner, hidden, held), draw.block_weight(hidden, inner, held)
        return cls(x, config.num_experts_per_tok, places, held, w13, w2)

    @property
    def num_pairs(self) -> int:
        return len(self.expert_of_pair)

    def pairs_of(self, expert: int) -> Tensor:
        return (self.expert_of_pair == expert).nonzero().flatten()

    def ours(self) -> Callable[[], Tensor]:
        device = self.x.codes.device
        row_of_pair = torch.arange(len(self.x.codes), device=device).repeat_interleave(self.slots)
        found, out = (
            index.dispatch_index(self.expert_of_pair, self.held),
            self.empty(self.num_pairs, self.w2[0].shape[1]),
        )
        return partial(experts.grouped_mlp_fp8, self.x, row_of_pair, found, *self.w13, *self.w2, False, out)

    def empty(self, *shape: int) -> Tensor:
        """bf16 zeros: what nobody computes agrees."""
        return torch.zeros(*shape, dtype=torch.bfloat16, device=self.x.codes.device)


def swiglu_quantised(both: Tensor) -> Quantised:
    """both: bf16 [n, 2I], the gate's columns first."""
    gate, up = both.float().chunk(2, -1)
    return norm.quantise((torch.nn.functional.silu(gate) * up).bfloat16(), False)


def vllm_experts(folder: Path, draw: Draw, config: ModelConfig, rows: int, held: int) -> list[Contest]:
    """With the tiles that vLLM takes where it has no table for a shape, as for whole V3 experts it has none."""
    file = folder / "vllm/model_executor/layers/fused_moe/fused_moe.py"
    kernel = extracted(file, ["write_zeros_to_output", "fused_moe_kernel"]).fused_moe_kernel
    tile = 16 if rows <= 64 else 64

    def one() -> Contest:
        operands = Operands.drawn(draw, config, rows, held)
        order = _padded_order(operands, tile)
        both, out = (
            operands.empty(operands.num_pairs, 2 * config.moe_intermediate_size),
            operands.empty(operands.num_pairs, config.hidden_size),
        )
        first = _vllm_call(kernel, operands.x, operands.w13, both, order, tile, operands.slots, rows)
        first()
        second = _vllm_call(kernel, swiglu_quantised(both), operands.w2, out, order, tile, 1, rows)

        def theirs() -> None:
            first()
            second()

        return Contest(theirs, operands.ours(), lambda: out)

    return taking_turns(one, expert_work(config, rows, held), draw)


def _padded_order(operands: Operands, tile: int) -> tuple[Tensor, Tensor]:
    """int32: pairs expert by expert, each expert's filled up to whole tiles; and the expert of each tile."""
    pairs, owners = [], []
    for expert in range(operands.held):
        own = operands.pairs_of(expert)
        num_tiles = triton.cdiv(len(own), tile)
        pairs += [own, own.new_full((num_tiles * tile - len(own),), operands.num_pairs)]
        owners += [expert] * num_tiles
    device = operands.x.codes.device
    return torch.cat(pairs).int(), torch.tensor(owners, dtype=torch.int32, device=device)


def _vllm_call(
    kernel: Any, x: Quantised, weight: tuple[Tensor, Tensor], out: Tensor, order: tuple[Tensor, Tensor], tile: int,
    slots: int, rows: int,
) -> Callable[[], object]:  # fmt: skip
    """out: [P, N]; a pair's row of x is pair // slots."""
    (codes, scales), (pairs, owners), outputs = weight, order, weight[0].shape[1]
    num_padded = torch.tensor([len(pairs)], dtype=torch.int32, device=out.device)
    named = {
        "a_ptr": x.codes, "b_ptr": codes, "c_ptr": out, "b_bias_ptr": None, "a_scale_ptr": x.scales,
        "b_scale_ptr": scales, "topk_weights_ptr": None, "sorted_token_ids_ptr": pairs, "expert_ids_ptr": owners,
        "num_tokens_post_padded_ptr": num_padded, "N": outputs, "K": codes.shape[2], "EM": len(pairs),
        "num_valid_tokens": len(out), "stride_am": x.codes.stride(0), "stride_ak": 1, "stride_be": codes.stride(0),
        "stride_bk": 1, "stride_bn": codes.stride(1), "stride_cm": out.stride(0), "stride_cn": 1, "stride_asm": 1,
        "stride_ask": x.scales.stride(0), "stride_bse": scales.stride(0), "stride_bsk": 1,
        "stride_bsn": scales.stride(1), "stride_bbe": 0, "stride_bbn": 0, "group_n": GROUP, "group_k": GROUP,
        "naive_block_assignment": False, "BLOCK_SIZE_M": tile, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128,
        "GROUP_SIZE_M": 1 if rows <= 16 else 32, "SPLIT_K": 1, "MUL_ROUTED_WEIGHT": False, "top_k": slots,
        "compute_type": tl.bfloat16, "use_fp8_w8a8": True, "use_int8_w8a8": False, "use_int8_w8a16": False,
        "per_channel_quant": False, "HAS_BIAS": False, "SWAP_AB": tile < 64,
    }  # fmt: skip
    grid = (len(owners) * triton.cdiv(outputs, 128),)
    return partial(kernel[grid], **accepted(kernel, named), num_warps=4, num_stages=3)


def accepted(kernel: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `named` that a Triton kernel takes. ValueError where it asks for more."""
    parameters = inspect.signature(kernel.fn).parameters
    wanted = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := wanted - set(named):
        asked = ", ".join(sorted(missing))
        raise ValueError(f"{kernel.fn.__name__} asks for {asked}, which vLLM 0.32's did not: carry that release's file")
    return {name: value for name, value in named.items() if name in parameters}


def deep_gemm_experts(folder: Path, draw: Draw, config: ModelConfig, rows: int, held: int) -> list[Contest]:
    module = imported("deep_gemm", folder)
    lay_out = function_of(module, ["get_mn_major_tma_aligned_tensor", "get_col_major_tma_aligned_tensor"])
    maker = _masked if rows <= MASKED_ROWS else _contiguous

    def one() -> Contest:
        return maker(module, lay_out, Operands.drawn(draw, config, rows, held))

    return taking_turns(one, expert_work(config, rows, held), draw)


def _masked(module: Any, lay_out: Callable[[Tensor], Tensor], operands: Operands) -> Contest:
    """As many places for every expert as the busiest one has rows; how many are taken lies in device memory."""
    multiply = function_of(module, ["m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked"])
    groups = [operands.pairs_of(expert) for expert in range(operands.held)]
    counts = torch.tensor([len(group) for group in groups], dtype=torch.int32, device=operands.x.codes.device)
    expected = max(-(-sum(map(len, groups)) // operands.held), 1)
    each = max(triton.cdiv(max(map(len, groups)), ALIGNMENT), 1) * ALIGNMENT

    def product(x: Quantised, weight: tuple[Tensor, Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """x: [held * each, K] -> [held * each, N]"""
        out = operands.empty(operands.held, each, weight[0].shape[1])
        scales = lay_out(x.scales.t().reshape(operands.held, each, -1).contiguous())
        codes = x.codes.view(operands.held, each, -1)
        return out.flatten(0, 1), partial(multiply, (codes, scales), weight, out, counts, expected)

    places = [expert * each for expert in range(operands.held)]
    return _deep_gemm_contest(operands, groups, places, operands.held * each, product)


def _contiguous(module: Any, lay_out: Callable[[Tensor], Tensor], operands: Operands) -> Contest:
    """Rows expert by expert, each expert's filled up to whole tiles."""
    multiply = function_of(module, ["m_grouped_fp8_gemm_nt_contiguous"])
    get_alignment = function_of(
        module, ["get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout"]
    )
    alignment, groups = int(get_alignment()), [operands.pairs_of(expert) for expert in range(operands.held)]
    places, owners = [], list[Tensor]()
    for expert, group in enumerate(groups):
        places.append(sum(map(len, owners)))
        padding = -len(group) % alignment
        owners.append(torch.tensor([expert] * len(group) + [-1] * padding, dtype=torch.int32))
    layout = torch.cat(owners).to(operands.x.codes.device)

    def product(x: Quantised, weight: tuple[Tensor, Tensor]) -> tuple[Tensor, Callable[[], object]]:
        out = operands.empty(len(layout), weight[0].shape[1])
        return out, partial(multiply, (x.codes, lay_out(x.scales.t().contiguous())), weight, out, layout)

    return _deep_gemm_contest(operands, groups, places, len(layout), product)


Product = Callable[[Quantised, tuple[Tensor, Tensor]], tuple[Tensor, Callable[[], object]]]


def _deep_gemm_contest(
    operands: Operands, groups: Sequence[Tensor], places: Sequence[int], num_rows: int, product: Product
) -> Contest:
    """`groups`: the pairs of each expert, `places`: where its rows begin among `num_rows`."""
    device, x = operands.x.codes.device, operands.x
    pairs = torch.cat(list(groups))
    at = torch.cat(
        [place + torch.arange(len(group), device=device) for place, group in zip(places, groups, strict=True)]
    )

    def spread(codes: Tensor, scales: Tensor) -> Quantised:
        """The rows of `pairs`, each at its place; the rest are zeros."""
        all_codes = torch.zeros(num_rows, codes.shape[1], dtype=torch.uint8, device=device)
        all_scales = torch.ones(len(scales), num_rows, device=device)
        all_codes[at], all_scales[:, at] = codes.view(torch.uint8), scales
        return Quantised(all_codes.view(codes.dtype), all_scales)

    row = pairs // operands.slots
    both, first = product(spread(x.codes[row], x.scales[:, row]), operands.w13)
    first()
    out, second = product(spread(*swiglu_quantised(both[at])), operands.w2)

    def theirs() -> None:
        first()
        second()

    def result() -> Tensor:
        rows = operands.empty(operands.num_pairs, out.shape[1])
        rows[pairs] = out[at]
        return rows

    return Contest(theirs, operands.ours(), result)


def function_of(module: Any, names: Sequence[str]) -> Callable[..., Any]:
    """The first of these that there is. AttributeError that names them all where there is none."""
    for name in names:
        if hasattr(module, name):
            function: Callable[..., Any] = getattr(module, name)
            return function
    raise AttributeError(f"{module.__name__} has no {' or '.join(names)}; DeepGEMM 2.1 to 2.8 have: carry one of them")


EXPERTS: dict[str, Callable[..., list[Contest]]] = {"vLLM Triton": vllm_experts, "DeepGEMM": deep_gemm_experts}
