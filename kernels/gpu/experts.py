"""The products of an expert worker: every expert that has rows, in one launch driven by the tile map.

`w13` holds the gate's rows first, then the up's. A program owns 128 columns of the inner width: it computes both
halves, applies SwiGLU and, in fp8, quantises what it holds, as 128 columns are one group of the next product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .index import DispatchIndex
from .norm import Quantised
from .scales import E4M3_MAX, group_scale, num_groups

TILE = 128
BF16_DEPTH = 64


@triton.jit
def w13_fp8_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr,
    codes_ptr, scales_ptr, K, I, E, x_scale_stride, scales_stride,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    column_tile = tl.program_id(0)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    if num_rows > 0:
        expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
        first_row = tl.load(tile_row_ptr + tile)
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        pair = tl.load(pair_ptr + first_row + place, mask=inside, other=0)
        token = (pair // SLOTS).to(tl.int64)
        depth = tl.arange(0, 128)
        steps = K // 128
        w_tiles = tl.make_tensor_descriptor(w_ptr, [E * 2 * I, K], [K, 1], [128, 128])
        gate_row = (expert * 2 * I + column_tile * 128).to(tl.int32)
        gate_scales = w_scale_ptr + (expert * 2 * I // 128 + column_tile) * steps
        up_scales = gate_scales + I // 128 * steps
        gate = tl.zeros((128, TOKENS), tl.float32)
        up = tl.zeros((128, TOKENS), tl.float32)
        for step in tl.range(0, steps):
            where = x_ptr + token[:, None] * K + (step * 128 + depth)[None, :]
            x = tl.load(where, mask=inside[:, None], other=0.0).T
            scale = tl.load(x_scale_ptr + step * x_scale_stride + token, mask=inside, other=0.0)
            w_gate = w_tiles.load([gate_row, step * 128])
            w_up = w_tiles.load([gate_row + I, step * 128])
            gate += tl.dot(w_gate, x) * (scale * tl.load(gate_scales + step))[None, :]
            up += tl.dot(w_up, x) * (scale * tl.load(up_scales + step))[None, :]
        # rounded where the unfused layer rounds: after each product, and after the activation
        gate = gate.to(tl.bfloat16).to(tl.float32)
        up = up.to(tl.bfloat16).to(tl.float32)
        inner = (gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16).to(tl.float32)
        scale = group_scale(tl.max(tl.abs(inner), 0), UE8M0)
        codes = tl.clamp(inner / scale[None, :], -E4M3_MAX, E4M3_MAX).to(tl.float8e4nv)
        row = (first_row + place).to(tl.int64)
        tl.store(codes_ptr + row[:, None] * I + (column_tile * 128 + depth)[None, :], codes.T, mask=inside[:, None])
        tl.store(scales_ptr + column_tile * scales_stride + row, scale, mask=inside)


@triton.jit
def w2_fp8_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr,
    out_ptr, R, H, I, E, x_scale_stride, TOKENS: tl.constexpr,
):  # fmt: skip
    column_tile = tl.program_id(0)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    if num_rows > 0:
        expert = tl.load(tile_expert_ptr + tile)
        first_row = tl.load(tile_row_ptr + tile)
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        steps = I // 128
        x_tiles = tl.make_tensor_descriptor(x_ptr, [R, I], [I, 1], [TOKENS, 128])
        w_tiles = tl.make_tensor_descriptor(w_ptr, [E * H, I], [I, 1], [128, 128])
        scales = w_scale_ptr + (expert * (H // 128) + column_tile).to(tl.int64) * steps
        total = tl.zeros((128, TOKENS), tl.float32)
        for step in tl.range(0, steps):
            x = x_tiles.load([first_row, step * 128])  # rows past num_rows: finite or not, no other column reads them
            w = w_tiles.load([expert * H + column_tile * 128, step * 128])
            scale = tl.load(x_scale_ptr + step * x_scale_stride + first_row + place, mask=inside, other=0.0)
            total += tl.dot(w, x.T) * (scale * tl.load(scales + step))[None, :]
        pair = tl.load(pair_ptr + first_row + place, mask=inside, other=0).to(tl.int64)
        where = out_ptr + pair[:, None] * H + (column_tile * 128 + tl.arange(0, 128))[None, :]
        tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def w13_bf16_kernel(
    x_ptr, w_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr, inner_ptr, K, I,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    if num_rows > 0:
        expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
        first_row = tl.load(tile_row_ptr + tile)
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        token = (tl.load(pair_ptr + first_row + place, mask=inside, other=0) // SLOTS).to(tl.int64)
        gate_rows = w_ptr + (expert * 2 * I + column)[:, None] * K
        gate = tl.zeros((COLUMNS, TOKENS), tl.float32)
        up = tl.zeros((COLUMNS, TOKENS), tl.float32)
        for start in range(0, K, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            x = tl.load(
                x_ptr + token[:, None] * K + depth[None, :], mask=inside[:, None] & (depth < K)[None, :], other=0.0
            )
            mask = (column < I)[:, None] & (depth < K)[None, :]
            w_gate = tl.load(gate_rows + depth[None, :], mask=mask, other=0.0)
            w_up = tl.load(gate_rows + I * K + depth[None, :], mask=mask, other=0.0)
            gate = tl.dot(w_gate, x.T, gate)
            up = tl.dot(w_up, x.T, up)
        gate = gate.to(tl.bfloat16).to(tl.float32)
        up = up.to(tl.bfloat16).to(tl.float32)
        inner = (gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16)
        where = inner_ptr + (first_row + place).to(tl.int64)[:, None] * I + column[None, :]
        tl.store(where, inner.T, mask=inside[:, None] & (column < I)[None, :])


@triton.jit
def w2_bf16_kernel(
    x_ptr, w_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr, out_ptr, H, I,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    if num_rows > 0:
        expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
        first_row = tl.load(tile_row_ptr + tile)
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        x_rows = x_ptr + (first_row + place).to(tl.int64)[:, None] * I
        w_rows = w_ptr + (expert * H + column)[:, None] * I
        total = tl.zeros((COLUMNS, TOKENS), tl.float32)
        for start in range(0, I, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            x = tl.load(x_rows + depth[None, :], mask=inside[:, None] & (depth < I)[None, :], other=0.0)
            w = tl.load(w_rows + depth[None, :], mask=(column < H)[:, None] & (depth < I)[None, :], other=0.0)
            total = tl.dot(w, x.T, total)
        pair = tl.load(pair_ptr + first_row + place, mask=inside, other=0).to(tl.int64)
        where = out_ptr + pair[:, None] * H + column[None, :]
        tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < H)[None, :])


def grouped_mlp_fp8(
    x: Quantised, slots: int, index: DispatchIndex, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor,
    ue8m0: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    """Rows of all pairs that are ours: out[pair] = expert(x[pair // slots]), bf16 [P, H]; others stay untouched.

    x: [M, H]; w13: e4m3 [E, 2I, H], its scales fp32 [E, 2I/128, H/128]; w2: e4m3 [E, H, I], scales [E, H/128, I/128].
    H and I must be multiples of 128.
    """
    experts, double_inner, hidden = w13.shape
    inner = double_inner // 2
    tiles = index.tile_expert.shape[0]
    if tiles == 0:
        return out
    codes = torch.empty(index.capacity, inner, dtype=torch.float8_e4m3fn, device=out.device)
    scales = torch.empty(num_groups(inner), index.capacity, device=out.device)
    warps = 8 if index.tile == 64 else 4
    w13_fp8_kernel[(inner // TILE, tiles)](
        x.codes, x.scales, w13, w13_scale, *index[:4], codes, scales, hidden, inner, experts,
        x.scales.stride(0), scales.stride(0), SLOTS=slots, TOKENS=index.tile, UE8M0=ue8m0,
        num_warps=warps, num_stages=4,
    )  # fmt: skip
    w2_fp8_kernel[(hidden // TILE, tiles)](
        codes, scales, w2, w2_scale, *index[:4], out, index.capacity, hidden, inner, experts, scales.stride(0),
        TOKENS=index.tile, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def grouped_mlp_bf16(x: Tensor, slots: int, index: DispatchIndex, w13: Tensor, w2: Tensor, out: Tensor) -> Tensor:
    """The same with bf16 weights [E, 2I, H] and [E, H, I], of any size. x: bf16 [M, H], out: bf16 [P, H]."""
    _, double_inner, hidden = w13.shape
    inner_width = double_inner // 2
    tiles = index.tile_expert.shape[0]
    if tiles == 0:
        return out
    inner = torch.empty(index.capacity, inner_width, dtype=torch.bfloat16, device=out.device)
    w13_bf16_kernel[(triton.cdiv(inner_width, 64), tiles)](
        x, w13, *index[:4], inner, hidden, inner_width,
        SLOTS=slots, TOKENS=index.tile, COLUMNS=64, DEPTH=BF16_DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip
    w2_bf16_kernel[(triton.cdiv(hidden, TILE), tiles)](
        inner, w2, *index[:4], out, hidden, inner_width,
        TOKENS=index.tile, COLUMNS=TILE, DEPTH=BF16_DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
