"""The products of an expert worker in bf16, of any width: as experts.py, without quantisation and by pointers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .index import DispatchIndex
from .mlp import swiglu

DEPTH = 64
INNER_TILE, HIDDEN_TILE = 64, 128


@triton.jit
def w13_bf16_kernel(
    x_ptr, row_ptr, w_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr, inner_ptr, K, I, x_stride,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x: [n, K] with rows x_stride apart, w: [E, 2I, K] -> SwiGLU of both halves: [P, I] in the index's order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    first_row = tl.load(tile_row_ptr + tile)
    if num_rows > 0:
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        row = first_row.to(tl.int64) + place
        pair = tl.load(pair_ptr + row, mask=inside, other=0)
        x_rows = x_ptr + tl.load(row_ptr + pair, mask=inside, other=0).to(tl.int64)[:, None] * x_stride
        gate_rows = w_ptr + (expert * 2 * I + column)[:, None] * K
        up_rows = gate_rows + tl.cast(I, tl.int64) * K
        gate = tl.zeros((COLUMNS, TOKENS), tl.float32)
        up = tl.zeros((COLUMNS, TOKENS), tl.float32)
        for start in tl.range(0, K, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            x = tl.load(x_rows + depth[None, :], mask=inside[:, None] & (depth < K)[None, :], other=0.0)
            mask = (column < I)[:, None] & (depth < K)[None, :]
            w_gate = tl.load(gate_rows + depth[None, :], mask=mask, other=0.0)
            w_up = tl.load(up_rows + depth[None, :], mask=mask, other=0.0)
            gate = tl.dot(w_gate, x.T, gate)
            up = tl.dot(w_up, x.T, up)
        inner = swiglu(gate, up).to(tl.bfloat16)
        tl.store(inner_ptr + row[:, None] * I + column[None, :], inner.T, mask=inside[:, None] & (column < I)[None, :])


@triton.jit
def w2_bf16_kernel(
    x_ptr, w_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr, out_ptr, H, I, out_stride,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x: [P, I] in the index's order, w: [E, H, I] -> out [P, H], each row at its pair's place."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    first_row = tl.load(tile_row_ptr + tile)
    if num_rows > 0:
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        row = first_row.to(tl.int64) + place
        x_rows = x_ptr + row[:, None] * I
        w_rows = w_ptr + (expert * H + column)[:, None] * I
        total = tl.zeros((COLUMNS, TOKENS), tl.float32)
        for start in tl.range(0, I, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            x = tl.load(x_rows + depth[None, :], mask=inside[:, None] & (depth < I)[None, :], other=0.0)
            w = tl.load(w_rows + depth[None, :], mask=(column < H)[:, None] & (depth < I)[None, :], other=0.0)
            total = tl.dot(w, x.T, total)
        pair = tl.load(pair_ptr + row, mask=inside, other=0).to(tl.int64)
        where = out_ptr + pair[:, None] * out_stride + column[None, :]
        tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < H)[None, :])


def grouped_mlp_bf16(
    x: Tensor, row_of_pair: Tensor, index: DispatchIndex, w13: Tensor, w2: Tensor, out: Tensor
) -> Tensor:
    """As grouped_mlp_fp8, of any size.

    x: bf16 [n, H] (rows may be strided), w13: bf16 [E, 2I, H], w2: bf16 [E, H, I], out: [P, H].
    """
    _, double_inner, hidden = w13.shape
    inner_width = double_inner // 2
    tiles = index.tile_expert.shape[0]
    if tiles == 0:
        return out
    inner = torch.empty(index.pair_of_row.shape[0], inner_width, dtype=torch.bfloat16, device=out.device)
    w13_bf16_kernel[(triton.cdiv(inner_width, INNER_TILE), tiles)](
        x, row_of_pair, w13, *index[:4], inner, hidden, inner_width, x.stride(0),
        TOKENS=index.tile, COLUMNS=INNER_TILE, DEPTH=DEPTH, num_warps=4, num_stages=4,
    )  # fmt: skip
    w2_bf16_kernel[(triton.cdiv(hidden, HIDDEN_TILE), tiles)](
        inner, w2, *index[:4], out, hidden, inner_width, out.stride(0),
        TOKENS=index.tile, COLUMNS=HIDDEN_TILE, DEPTH=DEPTH, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
