"""Dense products: block-scaled fp8 (1x128 activations, 128x128 weights) and bf16, weights on the tensor core's M side.

Law 5: tokens sit on wgmma's N, where every tile from 16 to 128 is one instruction family (QGMMA or HGMMA m64nNk16/32)
with the same order over K; so the tile may follow the load and a row keeps its bits. An fp8 group of 128 starts a sum
of its own, which is added in fp32: the promotion that DeepSeek-V3 asks for (paper, section 3.3.2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm import Quantised

WEIGHT_TILE = 128
BF16_DEPTH = 64


@triton.jit
def fp8_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, M, N, K, x_scale_stride, out_stride,
    TOKENS: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """x: e4m3 [M, K], w: e4m3 [N, K] -> out [M, N]; one weight tile of 128 outputs has one row of scales."""
    first_row = tl.program_id(0) * TOKENS  # token tiles fastest: they share the weight tile in L2
    tile = tl.program_id(1)
    x_tiles = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [TOKENS, 128])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [128, 128])
    row = first_row + tl.arange(0, TOKENS)
    output = tile * 128 + tl.arange(0, 128)
    steps = tl.cdiv(K, 128)
    total = tl.zeros((128, TOKENS), tl.float32)
    for step in tl.range(0, steps, warp_specialize=SPECIALISE):
        x = x_tiles.load([first_row, step * 128])
        w = w_tiles.load([tile * 128, step * 128])
        scale = tl.load(x_scale_ptr + step * x_scale_stride + row, mask=row < M, other=0.0)
        scale = scale * tl.load(w_scale_ptr + tile * steps + step)
        total += tl.dot(w, x.T) * scale[None, :]
    where = out_ptr + row.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (output < N)[None, :])


@triton.jit
def bf16_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, M, N, K, x_stride, out_stride,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x: [M, K] with rows x_stride apart, w: [N, K] -> out [M, N]. By pointers: small models have odd strides."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * 128 + tl.arange(0, 128)
    depth = tl.arange(0, DEPTH)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + output.to(tl.int64)[:, None] * K
    total = tl.zeros((128, TOKENS), tl.float32)
    for start in range(0, K, DEPTH):
        inside = start + depth < K
        x = tl.load(x_rows + (start + depth)[None, :], mask=(row < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_rows + (start + depth)[None, :], mask=(output < N)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(w, x.T, total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=output < N, other=0.0).to(tl.float32)[:, None]
    where = out_ptr + row.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (output < N)[None, :])


def token_tile(num_rows: int) -> int:
    """16 .. 128: below 16 the tensor core would take another instruction, and with it other bits."""
    return min(max(triton.next_power_of_2(num_rows), 16), 128)


def linear_fp8(x: Quantised, weight: Tensor, weight_scale: Tensor, out: Tensor | None = None) -> Tensor:
    """x: [M, K] quantised, weight: e4m3 [N, K], weight_scale: fp32 [ceil(N/128), ceil(K/128)] -> bf16 [M, N].

    K must be a multiple of 16, as the tensor memory accelerator asks.
    """
    (rows, depth), outputs = x.codes.shape, weight.shape[0]
    if out is None:
        out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=x.codes.device)
    if rows == 0:
        return out
    tokens = token_tile(rows)
    is_large = tokens == 128  # enough work a CTA for a warp group that does nothing but load
    fp8_kernel[(triton.cdiv(rows, tokens), triton.cdiv(outputs, WEIGHT_TILE))](
        x.codes, x.scales, weight, weight_scale, out, rows, outputs, depth, x.scales.stride(0), out.stride(0),
        TOKENS=tokens, SPECIALISE=is_large, num_warps=4, num_stages=3 if is_large else 4,
    )  # fmt: skip
    return out


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x: bf16 [M, K] (rows may be strided), weight: bf16 [N, K] -> [M, N] in `out`'s dtype, bf16 if not given."""
    (rows, depth), outputs = x.shape, weight.shape[0]
    if out is None:
        out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=x.device)
    if rows == 0:
        return out
    tokens = token_tile(rows)
    bf16_kernel[(triton.cdiv(rows, tokens), triton.cdiv(outputs, WEIGHT_TILE))](
        x, weight, bias, out, rows, outputs, depth, x.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, TOKENS=tokens, DEPTH=BF16_DEPTH, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
