"""The MLP that every token goes through: shared expert and dense layers.

Three launches: the product with w13 (gate rows first), SwiGLU with what is left of that product's sum and, in fp8, the
quantisation, and the product with w2. Fusing the first two would leave a shared expert's 4096 x 7168 to 16 programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import linear_bf16, linear_fp8, parts_bf16, parts_fp8
from .norm import Quantised, empty_quantised
from .scales import group_codes, group_scale
from .splits import sum_of_parts

BLOCK = 1024


@triton.jit
def swiglu(gate, up):
    """fp32, rounded to bf16 where the layers one after the other round: after each product, and after SwiGLU."""
    gate = gate.to(tl.bfloat16).to(tl.float32)
    up = up.to(tl.bfloat16).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16).to(tl.float32)


@triton.jit(do_not_specialize=["M", "scales_stride"])
def swiglu_kernel(
    parts_ptr, out_ptr, scales_ptr, M, I, scales_stride,
    PARTS: tl.constexpr, QUANTISES: tl.constexpr, UE8M0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    gate_ptr = parts_ptr + row * 2 * I + column
    part_stride = M.to(tl.int64) * 2 * I
    inner = swiglu(
        sum_of_parts(gate_ptr, part_stride, inside, PARTS), sum_of_parts(gate_ptr + I, part_stride, inside, PARTS)
    )
    if QUANTISES:
        grouped = tl.reshape(inner, (BLOCK // 128, 128))
        scale = group_scale(tl.max(tl.abs(grouped), 1), UE8M0)
        codes = group_codes(grouped, tl.broadcast_to(scale[:, None], (BLOCK // 128, 128)))
        tl.store(out_ptr + row * I + column, tl.reshape(codes, (BLOCK,)), mask=inside)
        group = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
        tl.store(scales_ptr + group.to(tl.int64) * scales_stride + row, scale, mask=group * 128 < I)
    else:
        tl.store(out_ptr + row * I + column, inner.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu_fp8(x: Quantised, w13: Tensor, w13_scale: Tensor, ue8m0: bool) -> Quantised:
    """x: [M, H], w13: e4m3 [2I, H], its scales fp32 [ceil(2I/128), ceil(H/128)] -> [M, I], quantised."""
    parts = parts_fp8(x, w13, w13_scale)
    to = empty_quantised(parts.shape[1], parts.shape[2] // 2, parts.device)
    _launch(parts, to.codes, to.scales, ue8m0)
    return to


def swiglu_mlp_fp8(
    x: Quantised, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, ue8m0: bool, out: Tensor | None = None
) -> Tensor:
    """x: [M, H], w13: e4m3 [2I, H], w2: e4m3 [H, I] and their scales -> [M, H]."""
    return linear_fp8(swiglu_fp8(x, w13, w13_scale, ue8m0), w2, w2_scale, out=out)


def swiglu_mlp_bf16(x: Tensor, w13: Tensor, w2: Tensor, out: Tensor | None = None) -> Tensor:
    """x: bf16 [M, H] (rows may be strided), w13: bf16 [2I, H], w2: bf16 [H, I] -> [M, H]."""
    parts = parts_bf16(x, w13)
    inner = torch.empty(parts.shape[1], parts.shape[2] // 2, dtype=torch.bfloat16, device=x.device)
    _launch(parts, inner, None, ue8m0=False)
    return linear_bf16(inner, w2, out=out)


def _launch(parts: Tensor, out: Tensor, scales: Tensor | None, ue8m0: bool) -> None:
    num_parts, num_rows, double_inner = parts.shape
    inner = double_inner // 2
    if num_rows == 0:
        return
    swiglu_kernel[(num_rows, triton.cdiv(inner, BLOCK))](
        parts, out, scales, num_rows, inner, 0 if scales is None else scales.stride(0),
        PARTS=num_parts, QUANTISES=scales is not None, UE8M0=ue8m0, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
