"""MLA over a prompt in the MHA form: new query rows against all keys up to their own, expanded from the latents.

Keys are visited in ascending tiles at absolute multiples, so a row's bits are the same whether its prompt came whole or
in chunks (DESIGN law 5); the tile of queries it shares a program with has no part in them. Keys and values are expanded
a piece at a time, and the softmax of a row goes on where it stopped, from fp32 memory: so the pieces have no part in
the bits either, and a context of any length needs no more memory than one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES, KEYS = 128, 128
PIECE = 4096  # positions expanded at once: 268 MB with 128 heads of 128 + 128
COPIED = 4096
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Positions start .. start + num - 1 of one sequence attend; their latents are in the cache already."""

    start: int
    num: int
    block_table: Tensor  # int64 [width]


@triton.jit
def gather_kernel(cache_ptr, table_ptr, out_ptr, total, BLOCK_ELEMENTS, COPIED: tl.constexpr):
    """Cache blocks one after another, up to `total` numbers: what follows the last position may be anything."""
    block = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COPIED + tl.arange(0, COPIED)
    mask = (at < BLOCK_ELEMENTS) & (block * BLOCK_ELEMENTS + at < total)
    x = tl.load(cache_ptr + tl.load(table_ptr + block) * BLOCK_ELEMENTS + at, mask=mask, other=0.0)
    tl.store(out_ptr + block * BLOCK_ELEMENTS + at, x, mask=mask)


@triton.jit
def attend_keys(
    q_nope, q_rope, k_nope, k_rope, v, key, position, scale_log2, highest, total, sums, MASKED: tl.constexpr
):
    """One tile of keys joins the running softmax. Subtractions from products are spelled as fma, so that tiles with and
    without a mask round alike."""
    scores = tl.dot(q_rope, k_rope.T, tl.dot(q_nope, k_nope.T))
    if MASKED:
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1))  # the first key of a piece is seen by all its queries: never -inf
    shift = new * scale_log2
    keep = tl.exp2(tl.fma(highest, scale_log2, -shift))
    weights = tl.exp2(tl.fma(scores, scale_log2, -shift[:, None]))
    total = tl.fma(total, keep, tl.sum(weights, 1))
    sums = tl.dot(weights.to(v.dtype), v, sums * keep[:, None])
    return new, total, sums


@triton.jit(do_not_specialize=["first", "num", "num_keys", "has_before", "has_next"])
def prefill_kernel(
    q_ptr, kv_ptr, latent_ptr, out_ptr, highest_ptr, total_ptr, sums_ptr, scale_log2, first, num, num_keys,
    has_before, has_next, H, q_row, q_head, out_row, out_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr,
    NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Query rows num x H x (NOPE + ROPE) at places first .. of a piece or behind it, against its num_keys keys:
    kv [num_keys, H, NOPE + VALUE], latent [num_keys, RANK + ROPE].

    has_before: earlier pieces left highest, total (fp32 [num, H]) and sums (fp32 [num, H, VALUE]).
    has_next: a later one reads them.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    query = tile * QUERIES + tl.arange(0, QUERIES)
    inside = query < num
    position = first + query
    nope = tl.arange(0, NOPE_BLOCK)
    rope = tl.arange(0, ROPE_BLOCK)
    value = tl.arange(0, VALUE_BLOCK)
    kv_width: tl.constexpr = NOPE + VALUE
    latent_width: tl.constexpr = RANK + ROPE
    q_base = q_ptr + query.to(tl.int64)[:, None] * q_row + head * q_head
    q_nope = tl.load(q_base + nope[None, :], mask=inside[:, None] & (nope < NOPE)[None, :], other=0.0)
    q_rope = tl.load(q_base + NOPE + rope[None, :], mask=inside[:, None] & (rope < ROPE)[None, :], other=0.0)
    state = query.to(tl.int64) * H + head
    state_values = sums_ptr + state[:, None] * VALUE + value[None, :]
    value_mask = inside[:, None] & (value < VALUE)[None, :]
    if has_before != 0:
        highest = tl.load(highest_ptr + state, mask=inside, other=0.0)
        total = tl.load(total_ptr + state, mask=inside, other=0.0)
        sums = tl.load(state_values, mask=value_mask, other=0.0)
    else:
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        sums = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
    end = tl.minimum(first + tl.minimum((tile + 1) * QUERIES, num), num_keys)
    if TILED:
        keys = tl.make_tensor_descriptor(kv_ptr, [num_keys, H * kv_width], [H * kv_width, 1], [KEYS, NOPE])
        values = tl.make_tensor_descriptor(kv_ptr, [num_keys, H * kv_width], [H * kv_width, 1], [KEYS, VALUE])
        ropes = tl.make_tensor_descriptor(latent_ptr, [num_keys, latent_width], [latent_width, 1], [KEYS, ROPE])
        seen_by_all = tl.minimum(first + tile * QUERIES + 1, end) // KEYS * KEYS
        for at in range(0, seen_by_all, KEYS):
            key = at + tl.arange(0, KEYS)
            k_nope = keys.load([at, head * kv_width])
            k_rope = ropes.load([at, RANK])
            v = values.load([at, head * kv_width + NOPE])
            highest, total, sums = attend_keys(
                q_nope, q_rope, k_nope, k_rope, v, key, position, scale_log2, highest, total, sums, False
            )
        for at in range(seen_by_all, end, KEYS):
            key = at + tl.arange(0, KEYS)
            k_nope = keys.load([at, head * kv_width])
            k_rope = ropes.load([at, RANK])
            v = values.load([at, head * kv_width + NOPE])
            highest, total, sums = attend_keys(
                q_nope, q_rope, k_nope, k_rope, v, key, position, scale_log2, highest, total, sums, True
            )
    else:
        for at in range(0, end, KEYS):
            key = at + tl.arange(0, KEYS)
            valid = (key < num_keys)[:, None]
            k_base = kv_ptr + (key.to(tl.int64)[:, None] * H + head) * kv_width
            k_nope = tl.load(k_base + nope[None, :], mask=valid & (nope < NOPE)[None, :], other=0.0)
            v = tl.load(k_base + NOPE + value[None, :], mask=valid & (value < VALUE)[None, :], other=0.0)
            r_base = latent_ptr + key.to(tl.int64)[:, None] * latent_width + RANK
            k_rope = tl.load(r_base + rope[None, :], mask=valid & (rope < ROPE)[None, :], other=0.0)
            highest, total, sums = attend_keys(
                q_nope, q_rope, k_nope, k_rope, v, key, position, scale_log2, highest, total, sums, True
            )
    is_done = position < num_keys  # the row has seen all it may see
    to = out_ptr + query.to(tl.int64)[:, None] * out_row + head * out_head + value[None, :]
    tl.store(to, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=value_mask & is_done[:, None])
    if has_next != 0:
        tl.store(highest_ptr + state, highest, mask=inside)
        tl.store(total_ptr + state, total, mask=inside)
        tl.store(state_values, sums, mask=value_mask)


def plan_prefill(start: int, num: int, block_table: Tensor) -> PrefillPlan:
    """block_table: int64 [width] on the device, of the sequence whose positions start .. start + num - 1 attend."""
    return PrefillPlan(start, num, block_table)


def gather_latents(cache_layer: Tensor, block_table: Tensor, num: int) -> Tensor:
    """The first `num` positions of a block table, one after another: [num, rank + rope]."""
    _, block_size, width = cache_layer.shape
    out = cache_layer.new_empty(num, width)
    grid = (triton.cdiv(num, block_size), triton.cdiv(block_size * width, COPIED))
    gather_kernel[grid](cache_layer, block_table, out, num * width, block_size * width, COPIED=COPIED, num_warps=4)
    return out


def mla_prefill(
    q: Tensor, cache_layer: Tensor, expand: Callable[[Tensor], Tensor], plan: PrefillPlan, softmax_scale: float,
    kv_lora_rank: int, v_head_dim: int, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q: bf16 [num, heads, d_nope + d_rope]; cache_layer: bf16 [blocks, block_size, rank + d_rope] ->
    [num, heads, d_v].

    `expand`: the product with kv_b, latents [n, rank] (strided rows) -> [n, heads * (d_nope + d_v)]; it must give a row
    the same bits whatever n is. Where a prompt comes in chunks, each expands the keys before it again.
    """
    num, heads, _ = q.shape
    block_size = cache_layer.shape[1]
    assert num == plan.num, f"{num} rows for a plan of {plan.num}"
    assert cache_layer.is_contiguous(), f"cache rows lie one after another, not {cache_layer.stride()} apart"
    assert PIECE % KEYS == PIECE % block_size == 0, (
        f"a piece of {PIECE} is not made of tiles and blocks of {block_size}"
    )
    out = q.new_empty(num, heads, v_head_dim) if out is None else out
    end = plan.start + num
    state = _State.of(num if end > PIECE else 0, heads, v_head_dim, q.device)
    for piece in range(0, end if num else 0, PIECE):
        latents = gather_latents(cache_layer, plan.block_table[piece // block_size :], min(end - piece, PIECE))
        kv = expand(latents[:, :kv_lora_rank])
        skipped = max(piece - plan.start, 0)  # rows that have seen all they may see
        first = plan.start + skipped - piece
        _attend_piece(
            q[skipped:], kv, latents, out[skipped:], state.rows_from(skipped), first, softmax_scale, kv_lora_rank,
            has_before=piece > 0, has_next=piece + PIECE < end,
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class _State:
    """The softmax of each row and head between two pieces."""

    highest: Tensor  # fp32 [num, heads]
    total: Tensor
    sums: Tensor  # fp32 [num, heads, d_v]

    @classmethod
    def of(cls, num: int, heads: int, v_head_dim: int, device: torch.device) -> _State:
        highest, total = torch.empty(2, num, heads, device=device).unbind()
        return cls(highest, total, torch.empty(num, heads, v_head_dim, device=device))

    def rows_from(self, row: int) -> _State:
        return _State(self.highest[row:], self.total[row:], self.sums[row:])


def _attend_piece(
    q: Tensor, kv: Tensor, latents: Tensor, out: Tensor, state: _State, first: int, softmax_scale: float, rank: int,
    has_before: bool, has_next: bool,
) -> None:  # fmt: skip
    """first: place in the piece of the first query row; it may lie behind the piece."""
    (num, heads, q_width), (num_keys, width), value = q.shape, latents.shape, out.shape[2]
    rope = width - rank
    sizes = q_width - rope, rope, value
    assert kv.is_contiguous(), f"keys lie one after another, not {kv.stride()} apart"
    blocks = [max(triton.next_power_of_2(size), 16) for size in sizes]
    prefill_kernel[(triton.cdiv(num, QUERIES), heads)](
        q, kv, latents, out, state.highest, state.total, state.sums, softmax_scale * LOG2_E, first, num, num_keys,
        int(has_before), int(has_next), heads, q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        NOPE=sizes[0], ROPE=rope, VALUE=value, RANK=rank, NOPE_BLOCK=blocks[0], ROPE_BLOCK=blocks[1],
        VALUE_BLOCK=blocks[2], QUERIES=QUERIES, KEYS=KEYS, TILED=blocks == list(sizes) and width % 8 == 0,
        num_warps=8, num_stages=2,
    )  # fmt: skip
