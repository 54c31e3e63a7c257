"""The products of an expert worker in fp8: every expert that has rows, in one launch driven by the tile map.

`w13` holds the gate's rows first, then the up's. A program owns 128 columns of the inner width: it computes both
halves, applies SwiGLU and quantises what it holds, as 128 columns are one group of the next product: the [rows, 2I]
between the two never meets memory. Weights come by the tensor memory accelerator, 34 KB a step, so that two programs an
SM keep some 130 KB in flight; scales are fetched a step ahead. Column tiles are fastest: an
expert's programs run side by side, and the token tiles of a busy expert meet its weights in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .gemm import tiles_of
from .index import DispatchIndex
from .mlp import swiglu
from .norm import Quantised, empty_quantised
from .scales import GROUP, group_codes, group_scale


@triton.jit(do_not_specialize=["x_scale_stride", "scales_stride"])
def w13_fp8_kernel(
    x_ptr, x_scale_ptr, row_ptr, w_tiles, w_scale_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr,
    codes_ptr, scales_ptr, K, I, x_scale_stride, scales_stride, TOKENS: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """x: e4m3 [n, K], w: e4m3 [E * 2I, K] -> SwiGLU of both halves, quantised: codes [P, I] in the index's order."""
    column_tile = tl.program_id(0)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    expert = tl.load(tile_expert_ptr + tile)
    first_row = tl.load(tile_row_ptr + tile)
    if num_rows > 0:
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        row = first_row.to(tl.int64) + place
        pair = tl.load(pair_ptr + row, mask=inside, other=0)
        x_row = tl.load(row_ptr + pair, mask=inside, other=0).to(tl.int32)
        depth = tl.arange(0, 128)
        steps = tl.cdiv(K, 128)
        gate_row = expert * 2 * I + column_tile * 128
        x_rows = x_ptr + x_row.to(tl.int64)[:, None] * K
        gate_scales = w_scale_ptr + (gate_row // 128).to(tl.int64) * steps
        up_scales = gate_scales + (I // 128) * steps
        x_scale = tl.load(x_scale_ptr + x_row, mask=inside, other=0.0)
        gate_scale = tl.load(gate_scales)
        up_scale = tl.load(up_scales)
        gate = tl.zeros((128, TOKENS), tl.float32)
        up = tl.zeros((128, TOKENS), tl.float32)
        for step in tl.range(0, steps):
            column = step * 128 + depth
            w_gate = w_tiles.load([gate_row, step * 128])  # first: their places need no look at the index
            w_up = w_tiles.load([gate_row + I, step * 128])
            x = tl.load(x_rows + column[None, :], mask=inside[:, None] & (column < K)[None, :], other=0.0).T
            ahead = tl.minimum(step + 1, steps - 1)
            next_scale = tl.load(x_scale_ptr + (ahead * x_scale_stride + x_row), mask=inside, other=0.0)
            gate = tl.fma(tl.dot(w_gate, x), tl.broadcast_to((x_scale * gate_scale)[None, :], (128, TOKENS)), gate)
            up = tl.fma(tl.dot(w_up, x), tl.broadcast_to((x_scale * up_scale)[None, :], (128, TOKENS)), up)
            x_scale = next_scale
            gate_scale = tl.load(gate_scales + ahead)
            up_scale = tl.load(up_scales + ahead)
        inner = swiglu(gate, up)
        scale = group_scale(tl.max(tl.abs(inner), 0), UE8M0)
        codes = group_codes(inner, tl.broadcast_to(scale[None, :], (128, TOKENS)))
        tl.store(codes_ptr + row[:, None] * I + (column_tile * 128 + depth)[None, :], codes.T, mask=inside[:, None])
        tl.store(scales_ptr + column_tile.to(tl.int64) * scales_stride + row, scale, mask=inside)


@triton.jit(do_not_specialize=["x_scale_stride"])
def w2_fp8_kernel(
    x_tiles, x_scale_ptr, w_tiles, w_scale_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr,
    out_ptr, H, I, x_scale_stride, out_stride, TOKENS: tl.constexpr,
):  # fmt: skip
    """x: e4m3 [P, I] in the index's order, w: e4m3 [E * H, I] -> out [P, H], each row at its pair's place."""
    column_tile = tl.program_id(0)
    tile = tl.program_id(1)
    num_rows = tl.load(tile_rows_ptr + tile)
    expert = tl.load(tile_expert_ptr + tile)
    first_row = tl.load(tile_row_ptr + tile)
    if num_rows > 0:
        place = tl.arange(0, TOKENS)
        inside = place < num_rows
        steps = I // 128
        w_row = expert * H + column_tile * 128
        x_scales = x_scale_ptr + first_row + place
        w_scales = w_scale_ptr + (expert * tl.cdiv(H, 128) + column_tile).to(tl.int64) * steps
        x_scale = tl.load(x_scales, mask=inside, other=0.0)
        w_scale = tl.load(w_scales)
        total = tl.zeros((128, TOKENS), tl.float32)
        for step in tl.range(0, steps):
            x = x_tiles.load([first_row, step * 128])  # past num_rows: whatever it is, no other column reads it
            w = w_tiles.load([w_row, step * 128])
            ahead = tl.minimum(step + 1, steps - 1)
            next_scale = tl.load(x_scales + ahead.to(tl.int64) * x_scale_stride, mask=inside, other=0.0)
            total = tl.fma(tl.dot(w, x.T), tl.broadcast_to((x_scale * w_scale)[None, :], (128, TOKENS)), total)
            x_scale = next_scale
            w_scale = tl.load(w_scales + ahead)
        pair = tl.load(pair_ptr + first_row + place, mask=inside, other=0).to(tl.int64)
        column = column_tile * 128 + tl.arange(0, 128)
        where = out_ptr + pair[:, None] * out_stride + column[None, :]
        tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < H)[None, :])


def grouped_mlp_fp8(
    x: Quantised, row_of_pair: Tensor, index: DispatchIndex, w13: Tensor, w13_scale: Tensor, w2: Tensor,
    w2_scale: Tensor, ue8m0: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    """out[p] = expert_of_pair[p](x[row_of_pair[p]]) for the pairs that are ours; other rows stay as they are.

    x: [n, H], row_of_pair: integers [P], w13: e4m3 [E, 2I, H], its scales fp32 [E, 2I/128, ceil(H/128)], w2: e4m3
    [E, H, I], its scales [E, ceil(H/128), I/128], out: [P, H]. ValueError where I is no multiple of 128, or H of 16.
    """
    _, double_inner, hidden = w13.shape
    inner = double_inner // 2
    if inner % GROUP:
        raise ValueError(
            f"experts in fp8 with {inner} inner columns: SwiGLU is quantised in groups of {GROUP} columns as it is "
            f"computed, so keep these experts in bfloat16"
        )
    tiles = index.tile_expert.shape[0]
    if tiles == 0:
        return out
    w13_tiles, w2_tiles = tiles_of(w13.flatten(0, 1), GROUP), tiles_of(w2.flatten(0, 1), GROUP)
    to = empty_quantised(index.pair_of_row.shape[0], inner, out.device)
    w13_fp8_kernel[(inner // GROUP, tiles)](
        x.codes, x.scales, row_of_pair, w13_tiles, w13_scale, *index[:4], to.codes, to.scales, hidden, inner,
        x.scales.stride(0), to.scales.stride(0), TOKENS=index.tile, UE8M0=ue8m0,
        num_warps=8 if index.tile == 64 else 4, num_stages=3,
    )  # fmt: skip
    w2_fp8_kernel[(triton.cdiv(hidden, GROUP), tiles)](
        tiles_of(to.codes, index.tile), to.scales, w2_tiles, w2_scale, *index[:4], out, hidden, inner,
        to.scales.stride(0), out.stride(0), TOKENS=index.tile, num_warps=4, num_stages=5 if index.tile == 16 else 4,
    )  # fmt: skip
    return out
