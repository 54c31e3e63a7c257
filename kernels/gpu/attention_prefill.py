"""MLA over a prompt in the MHA form: new query rows against all keys up to their own, expanded from the latents.

Keys are visited in ascending tiles at absolute multiples, so a row's bits are the same whether its prompt came whole or
in chunks (DESIGN law 5); the tile of queries it shares a program with has no part in them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

QUERIES, KEYS = 128, 64


@triton.jit
def prefill_kernel(
    q_ptr, k_ptr, rope_ptr, v_ptr, out_ptr, scale_log2, start, num, H,
    q_row, q_head, k_row, k_head, rope_row, v_row, v_head, out_row, out_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, NOPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """q: [num, H, NOPE + ROPE] of positions start .. start + num - 1; k, v: [end, H, ..]; rope: [end, ROPE]."""
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    query = tile * QUERIES + tl.arange(0, QUERIES)
    inside = query < num
    position = start + query
    nope = tl.arange(0, NOPE_BLOCK)
    rope = tl.arange(0, ROPE)
    value = tl.arange(0, VALUE_BLOCK)
    q_base = q_ptr + query.to(tl.int64)[:, None] * q_row + head * q_head
    q_nope = tl.load(q_base + nope[None, :], mask=inside[:, None] & (nope < NOPE)[None, :], other=0.0)
    q_rope = tl.load(q_base + (NOPE + rope)[None, :], mask=inside[:, None], other=0.0)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
    end = start + tl.minimum((tile + 1) * QUERIES, num)
    for at in range(0, end, KEYS):
        key = at + tl.arange(0, KEYS)
        valid = (key < end)[:, None]
        row = key.to(tl.int64)[:, None]
        k_nope = tl.load(
            k_ptr + row * k_row + head * k_head + nope[None, :], mask=valid & (nope < NOPE)[None, :], other=0.0
        )
        k_rope = tl.load(rope_ptr + row * rope_row + rope[None, :], mask=valid, other=0.0)
        scores = (tl.dot(q_nope, k_nope.T) + tl.dot(q_rope, k_rope.T)) * scale_log2
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))  # key 0 is seen by all: never -inf
        keep = tl.exp2(highest - new)
        weights = tl.exp2(scores - new[:, None])
        v = tl.load(
            v_ptr + row * v_row + head * v_head + value[None, :], mask=valid & (value < VALUE)[None, :], other=0.0
        )
        total = total * keep + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * keep[:, None])
        highest = new
    to = out_ptr + query.to(tl.int64)[:, None] * out_row + head * out_head + value[None, :]
    tl.store(to, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None] & (value < VALUE)[None, :])


@triton.jit
def gather_kernel(cache_ptr, table_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    position = tl.program_id(0)
    block = tl.load(table_ptr + position // BLOCK).to(tl.int64)
    column = tl.arange(0, PADDED)
    x = tl.load(cache_ptr + (block * BLOCK + position % BLOCK) * WIDTH + column, mask=column < WIDTH)
    tl.store(out_ptr + position.to(tl.int64) * WIDTH + column, x, mask=column < WIDTH)


def gather_latents(cache_layer: Tensor, block_table: Tensor, length: int) -> Tensor:
    """Positions 0 .. length - 1 of one sequence, side by side: [length, rank + rope]."""
    _, block_size, width = cache_layer.shape
    out = cache_layer.new_empty(length, width)
    gather_kernel[(length,)](
        cache_layer, block_table, out, WIDTH=width, BLOCK=block_size, PADDED=triton.next_power_of_2(width), num_warps=1
    )
    return out


def mla_prefill(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, start: int, softmax_scale: float, out: Tensor | None = None
) -> Tensor:
    """q: bf16 [num, heads, d_nope + d_rope] at positions start ..; k_nope: [start + num, heads, d_nope], k_rope:
    [start + num, d_rope], v: [start + num, heads, d_v] -> [num, heads, d_v]. d_rope must be a power of two from 16 up.

    The keys before `start` are those of the cached prefix: their latents are expanded by the same product.
    """
    num, heads, width = q.shape
    rope, value = k_rope.shape[1], v.shape[2]
    nope = width - rope
    assert k_nope.shape[0] == start + num, f"{k_nope.shape[0]} keys for positions up to {start + num}"
    out = q.new_empty(num, heads, value) if out is None else out
    if num:
        prefill_kernel[(heads, triton.cdiv(num, QUERIES))](
            q, k_nope, k_rope, v, out, softmax_scale * 1.4426950408889634, start, num, heads,
            q.stride(0), q.stride(1), k_nope.stride(0), k_nope.stride(1), k_rope.stride(0), v.stride(0), v.stride(1),
            out.stride(0), out.stride(1), NOPE=nope, ROPE=rope, VALUE=value,
            NOPE_BLOCK=max(triton.next_power_of_2(nope), 16), VALUE_BLOCK=max(triton.next_power_of_2(value), 16),
            QUERIES=QUERIES, KEYS=KEYS, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out
