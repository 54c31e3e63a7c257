"""Residual sum, RMSNorm and per-128 quantisation of a row, in one pass over it.

A program is a row: its sum is one reduction over a block that the width alone decides, so it never sees its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scales import E4M3, GROUP, group_codes, group_scale, num_groups


class Quantised(NamedTuple):
    """codes: e4m3 [M, K], contiguous; scales: fp32 [ceil(K / 128), M], a group's side by side as products read them."""

    codes: Tensor
    scales: Tensor


def empty_quantised(rows: int, columns: int, device: torch.device) -> Quantised:
    """Memory for `rows` rows of `columns` codes and their scales."""
    codes = torch.empty(rows, columns, dtype=E4M3, device=device)
    return Quantised(codes, torch.empty(num_groups(columns), rows, device=device))


@triton.jit(do_not_specialize=["scales_stride"])
def norm_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, codes_ptr, scales_ptr,
    x_stride, delta_stride, out_stride, scales_stride, columns, eps,
    HAS_DELTA: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_OUT: tl.constexpr, QUANTISES: tl.constexpr,
    UE8M0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    if HAS_DELTA:  # rounded to the stream's dtype before it is normed, as the layers do one after the other
        delta = tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (wide + delta).to(dtype)
        tl.store(x_ptr + row * x_stride + column, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    if HAS_WEIGHT:
        root = tl.sqrt_rn(tl.sum(wide * wide, 0) / columns + eps)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        normed = (wide * (1.0 / root)).to(dtype).to(tl.float32)
        wide = (normed * weight).to(dtype).to(tl.float32)
    if HAS_OUT:
        tl.store(out_ptr + row * out_stride + column, wide.to(dtype), mask=inside)
    if QUANTISES:
        grouped = tl.reshape(wide, (BLOCK // 128, 128))
        scale = group_scale(tl.max(tl.abs(grouped), 1), UE8M0)
        codes = group_codes(grouped, tl.broadcast_to(scale[:, None], (BLOCK // 128, 128)))
        tl.store(codes_ptr + row * columns + column, tl.reshape(codes, (BLOCK,)), mask=inside)
        group = tl.arange(0, BLOCK // 128)
        tl.store(scales_ptr + group * scales_stride + row, scale, mask=group * 128 < columns)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x += delta in place (where there is one), then the norm of x: [M, H] -> [M, H]; rows may be strided."""
    out = torch.empty_like(x) if out is None else out
    _launch(x, delta, weight, eps, out, None, ue8m0=False)
    return out


def add_rms_norm_quantised(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, ue8m0: bool, out: Tensor | None = None,
    to: Quantised | None = None,
) -> Quantised:  # fmt: skip
    """The same, quantised; `out` receives the norm as it is too (the gate reads it)."""
    to = empty_quantised(x.shape[0], x.shape[1], x.device) if to is None else to
    _launch(x, delta, weight, eps, out, to, ue8m0)
    return to


def quantise(x: Tensor, ue8m0: bool, to: Quantised | None = None) -> Quantised:
    """[M, K] (rows may be strided) -> its codes and scales; `ue8m0`: scales are powers of two."""
    to = empty_quantised(x.shape[0], x.shape[1], x.device) if to is None else to
    _launch(x, None, None, 0.0, None, to, ue8m0)
    return to


def _launch(
    x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float, out: Tensor | None, to: Quantised | None,
    ue8m0: bool,
) -> None:  # fmt: skip
    rows, columns = x.shape
    if rows == 0:
        return
    block = max(triton.next_power_of_2(columns), GROUP)
    norm_kernel[(rows,)](
        x, delta, weight, out, to and to.codes, to and to.scales,
        x.stride(0), 0 if delta is None else delta.stride(0), 0 if out is None else out.stride(0),
        0 if to is None else to.scales.stride(0), columns, eps,
        HAS_DELTA=delta is not None, HAS_WEIGHT=weight is not None, HAS_OUT=out is not None,
        QUANTISES=to is not None, UE8M0=ue8m0, BLOCK=block, num_warps=8 if block >= 4096 else 4,
    )  # fmt: skip
