"""MLA over the paged latent cache in the absorbed form: decode, replay and the rows of a draft's verification.

Keys are visited in splits of a constant number of absolute positions, in ascending tiles; a second kernel merges the
splits in ascending order. So a row's bits follow from its own position and its own cache, whoever else is in the batch
(DESIGN law 5). Where a model has few heads, consecutive rows of one sequence share a tile of keys: their heads lie side
by side on wgmma's M. Where its heads fill a tile, tiles of the same keys follow one another, and meet in L2.

Which program computes which split is a list in device memory: so a captured graph survives other lengths and other
numbers of rows a sequence, and short rows of a part cost nothing beside a long one; the programs that find nothing on
the list are the last ones and end at once. Parts are launched one after the other: beside a row of 128K positions a
part has no more than eight rows, so many short rows beside one of those leave most of the chip idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 1024  # a deployment's constant: another length rounds otherwise
KEYS = 64
LANES = 64  # heads x rows of a tile: wgmma's M, whatever the model's heads, so that one instruction does them all
MAX_ITEMS = 1024  # (row, split) pairs whose partial results are held at once: 268 MB with 128 heads of 512
SCAN = 1024
LISTED = 16
MERGED_HEADS = 4
LOG2_E = 1.4426950408889634
# A step's numbers lie one behind the other: of an odd number of rows no 16 bytes begin them, which is no other kernel.
NUMBERS = ("position_ptr", "first_ptr", "table_ptr")


@dataclass(frozen=True, slots=True)
class DecodePart:
    """`items`: int32 [1 + rows * splits]: how many there are, then first row of a tile * splits + split of each."""

    rows: slice
    items: Tensor


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Made once a step, used by every layer. All of it stays where it is when `refresh` follows new numbers."""

    positions: Tensor  # int64 [R]
    block_tables: Tensor  # int64 [R, width]
    firsts: Tensor  # int64 [R]
    block_size: int
    num_heads: int
    splits: int
    parts: tuple[DecodePart, ...]

    @property
    def queries(self) -> int:
        """Rows that a tile has lanes for. It follows from the model alone: so does the kernel that is compiled."""
        return max(LANES // triton.next_power_of_2(self.num_heads), 1)


@triton.jit(do_not_specialize=["R", "begun", "max_splits"], do_not_specialize_on_alignment=NUMBERS[:2])
def list_kernel(
    position_ptr, first_ptr, item_ptr, R, begun, max_splits,
    QUERIES: tl.constexpr, SPLIT: tl.constexpr, SCAN: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One program a row lists the splits of the tile that begins there; no atomics: the order is fixed.

    Sequence by sequence, then split by split, then tile by tile: those who read the same keys stand together. A tile
    is listed for all splits of its sequence's last row; where it ends before one it finds nothing to do there.
    """
    mine = tl.program_id(0)
    first = tl.maximum(tl.load(first_ptr + mine) - begun, 0)
    before = 0
    tiles = 0
    splits = 0
    for start in range(0, R, SCAN):
        row = start + tl.arange(0, SCAN)
        own = tl.maximum(tl.load(first_ptr + row, mask=row < R, other=0) - begun, 0)
        next_first = tl.load(first_ptr + row + 1, mask=row + 1 < R, other=-1)
        is_last = (row < R) & ((row + 1 == R) | (next_first != tl.load(first_ptr + row, mask=row < R, other=0)))
        last = tl.load(position_ptr + row, mask=is_last, other=-1)
        own_tiles = ((row - own) // QUERIES + 1).to(tl.int32)
        own_splits = ((last + SPLIT) // SPLIT).to(tl.int32)
        before += tl.sum(tl.where(is_last & (own < first), own_tiles * own_splits, 0), 0)
        tiles += tl.sum(tl.where(is_last & (own == first), own_tiles, 0), 0)
        splits += tl.sum(tl.where(is_last & (own == first), own_splits, 0), 0)
    if (mine - first) % QUERIES == 0:
        to = item_ptr + 1 + before + ((mine - first) // QUERIES).to(tl.int32)
        for first_split in range(0, splits, LISTED):
            split = first_split + tl.arange(0, LISTED)
            tl.store(to + split * tiles, mine * max_splits + split, mask=split < splits)
    if mine == R - 1:
        tl.store(item_ptr, before + tiles * splits)


@triton.jit
def attend_tile(q_latent, q_rope, latent, k_rope, key, last, scale_log2, highest, total, sums):
    """One tile of keys joins the running softmax of every lane; a lane that sees none of it stays as it is.

    The products that are subtracted from are spelled as fma: a compiler's own choice could differ between two places.
    """
    scores = tl.dot(q_rope, k_rope.T, tl.dot(q_latent, latent.T))
    scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new * scale_log2)  # no inf is taken from an inf
    keep = tl.exp2(tl.fma(highest, scale_log2, -safe))
    weights = tl.exp2(tl.fma(scores, scale_log2, -safe[:, None]))
    total = tl.fma(total, keep, tl.sum(weights, 1))
    sums = tl.dot(weights.to(latent.dtype), latent, sums * keep[:, None])
    return new, total, sums


@triton.jit(do_not_specialize=["num_slots", "table_row", "max_splits", "R"], do_not_specialize_on_alignment=NUMBERS)
def split_kernel(
    q_ptr, cache_ptr, table_ptr, position_ptr, first_ptr, item_ptr, partial_ptr, lse_ptr, out_ptr, scale_log2,
    num_slots, q_row, q_head, out_row, out_head, table_row, max_splits, R, H,
    QUERIES: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    RANK: tl.constexpr, ROPE: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    """One program an (item, head tile); those of one item follow one another: they share its keys in L2.

    What lies past the end of a sequence may be NaN, and 0 * NaN is NaN: it is not read. TILED: by tensor descriptors,
    one of which ends where the sequence does and gives zeros from there on.
    """
    heads_each: tl.constexpr = LANES // QUERIES
    head_tiles = tl.cdiv(H, heads_each)
    turn = tl.program_id(0)
    if turn < tl.load(item_ptr) * head_tiles:
        item = tl.load(item_ptr + 1 + turn // head_tiles)
        first_row = item // max_splits
        split = item % max_splits
        lane = tl.arange(0, LANES)
        row = first_row + lane // heads_each
        head = turn % head_tiles * heads_each + lane % heads_each
        inside = head < H
        if QUERIES > 1:  # as many of the rows from the first one on as are of its sequence
            first = tl.load(first_ptr + row, mask=row < R, other=-1)
            inside = inside & (first == tl.load(first_ptr + first_row))
        last = tl.load(position_ptr + row, mask=inside, other=-1).to(tl.int32)
        longest = tl.max(last, 0)
        start = split * SPLIT
        stop = tl.maximum(tl.minimum(longest + 1, start + SPLIT), start)
        rank = tl.arange(0, RANK_BLOCK)
        rope = tl.arange(0, ROPE_BLOCK)
        width: tl.constexpr = RANK + ROPE
        query = q_ptr + row[:, None] * q_row + head[:, None] * q_head
        q_latent = tl.load(query + rank[None, :], mask=inside[:, None] & (rank < RANK)[None, :], other=0.0)
        q_rope = tl.load(query + RANK + rope[None, :], mask=inside[:, None] & (rope < ROPE)[None, :], other=0.0)
        table = table_ptr + first_row.to(tl.int64) * table_row
        highest = tl.full((LANES,), float("-inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        sums = tl.zeros((LANES, RANK_BLOCK), tl.float32)
        if TILED:
            latents = tl.make_tensor_descriptor(cache_ptr, [num_slots, width], [width, 1], [KEYS, RANK])
            ropes = tl.make_tensor_descriptor(cache_ptr, [num_slots, width], [width, 1], [KEYS, ROPE])
            whole = start + (stop - start) // KEYS * KEYS
            for at in range(start, whole, KEYS):
                place = (tl.load(table + at // BLOCK) * BLOCK + at % BLOCK).to(tl.int32)
                latent = latents.load([place, 0])
                k_rope = ropes.load([place, RANK])
                key = at + tl.arange(0, KEYS)
                highest, total, sums = attend_tile(
                    q_latent, q_rope, latent, k_rope, key, last, scale_log2, highest, total, sums
                )
            if whole < stop:
                base = cache_ptr + (tl.load(table + whole // BLOCK) * BLOCK + whole % BLOCK) * width
                few_latents = tl.make_tensor_descriptor(base, [stop - whole, width], [width, 1], [KEYS, RANK])
                few_ropes = tl.make_tensor_descriptor(base, [stop - whole, width], [width, 1], [KEYS, ROPE])
                latent = few_latents.load([0, 0])
                k_rope = few_ropes.load([0, RANK])
                key = whole + tl.arange(0, KEYS)
                highest, total, sums = attend_tile(
                    q_latent, q_rope, latent, k_rope, key, last, scale_log2, highest, total, sums
                )
        else:
            for at in range(start, stop, KEYS):
                key = at + tl.arange(0, KEYS)
                place = tl.load(table + at // BLOCK) * BLOCK + key % BLOCK
                base = cache_ptr + place[:, None] * width
                valid = (key < stop)[:, None]
                latent = tl.load(base + rank[None, :], mask=valid & (rank < RANK)[None, :], other=0.0)
                k_rope = tl.load(base + RANK + rope[None, :], mask=valid & (rope < ROPE)[None, :], other=0.0)
                highest, total, sums = attend_tile(
                    q_latent, q_rope, latent, k_rope, key, last, scale_log2, highest, total, sums
                )
        seen = last >= start  # not where nobody is: there it is -1
        mask = seen[:, None] & (rank < RANK)[None, :]
        total = tl.where(seen, total, 1.0)
        sums = sums * (1.0 / total)[:, None]
        to = out_ptr + (row * out_row + head * out_head)[:, None] + rank[None, :]
        tl.store(to, sums.to(out_ptr.dtype.element_ty), mask=mask & (last < SPLIT)[:, None])  # nothing to merge
        if longest >= SPLIT:
            mask = mask & (last >= SPLIT)[:, None]
            where = (row * H + head) * max_splits + split
            tl.store(partial_ptr + (where * RANK)[:, None] + rank[None, :], sums, mask=mask)
            tl.store(lse_ptr + where, tl.fma(highest, scale_log2, tl.log2(total)), mask=seen & (last >= SPLIT))


@triton.jit(do_not_specialize=["max_splits"], do_not_specialize_on_alignment=NUMBERS[:1])
def merge_kernel(
    partial_ptr, lse_ptr, position_ptr, out_ptr, out_row, out_head, max_splits, H,
    SPLIT: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(position_ptr + row)
    if last >= SPLIT:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        rank = tl.arange(0, RANK_BLOCK)
        mask = (head < H)[:, None] & (rank < RANK)[None, :]
        highest = tl.full((HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        sums = tl.zeros((HEADS, RANK_BLOCK), tl.float32)
        for split in range(0, (last // SPLIT + 1).to(tl.int32)):  # ascending, always
            where = (row * H + head) * max_splits + split
            lse = tl.load(lse_ptr + where, mask=head < H, other=0.0)
            new = tl.maximum(highest, lse)
            keep = tl.exp2(highest - new)
            weight = tl.exp2(lse - new)
            part = tl.load(partial_ptr + where[:, None] * RANK + rank[None, :], mask=mask, other=0.0)
            sums = tl.fma(part, weight[:, None], sums * keep[:, None])
            total = tl.fma(total, keep, weight)
            highest = new
        to = out_ptr + row * out_row + head[:, None] * out_head + rank[None, :]
        tl.store(to, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def plan_decode(
    positions: Tensor, block_tables: Tensor, block_size: int, num_heads: int, firsts: Tensor | None = None
) -> DecodePlan:
    """positions: int64 [R], each row sees keys 0 .. position of its sequence (-1: none, its result is left alone);
    block_tables: int64 [R, width], filled up with any block; firsts: int64 [R], of the rows here the first of those
    whose consecutive positions of one sequence lead to this one. All are read again by every use of the plan.

    Without `firsts` every row stands for itself. The bits are the same.
    """
    rows, width = block_tables.shape
    assert block_size % KEYS == 0, f"a block of {block_size} tokens is not made of tiles of {KEYS}"
    firsts = torch.arange(rows, device=positions.device) if firsts is None else firsts
    splits = max(triton.cdiv(width * block_size, SPLIT), 1)
    each = max(MAX_ITEMS // splits, 1)
    parts = []
    for first in range(0, rows, each):
        part = slice(first, min(first + each, rows))
        items = torch.empty(1 + (part.stop - first) * splits, dtype=torch.int32, device=positions.device)
        parts.append(DecodePart(part, items))
    plan = DecodePlan(positions, block_tables, firsts, block_size, num_heads, splits, tuple(parts))
    refresh(plan)
    return plan


def refresh(plan: DecodePlan) -> None:
    """Lists the work anew after `positions` or `firsts` changed; once a step, before the first layer."""
    for part in plan.parts:
        rows = part.rows.stop - part.rows.start
        list_kernel[(rows,)](
            plan.positions[part.rows], plan.firsts[part.rows], part.items, rows, part.rows.start, plan.splits,
            QUERIES=plan.queries, SPLIT=SPLIT, SCAN=SCAN, LISTED=LISTED, num_warps=4,
        )  # fmt: skip


def mla_decode(
    q: Tensor, cache_layer: Tensor, plan: DecodePlan, softmax_scale: float, kv_lora_rank: int, out: Tensor | None = None
) -> Tensor:
    """q: bf16 [R, heads, rank + rope], absorbed; cache_layer: bf16 [blocks, block_size, rank + rope] -> attended
    latents [R, heads, rank]. What the cache holds past a row's position is not read."""
    (rows, heads, width), rank = q.shape, kv_lora_rank
    rope, queries, splits = width - rank, plan.queries, plan.splits
    assert rows == len(plan.positions), f"{rows} rows for a plan of {len(plan.positions)}"
    assert heads == plan.num_heads, f"{heads} heads for a plan of {plan.num_heads}"
    assert cache_layer.is_contiguous(), f"cache rows lie one after another, not {cache_layer.stride()} apart"
    out = q.new_empty(rows, heads, rank) if out is None else out
    most = max((part.rows.stop - part.rows.start for part in plan.parts), default=0)
    needs_merge = splits > 1
    partial = torch.empty(most * heads * splits * rank if needs_merge else 0, device=q.device)
    lse = torch.empty(most * heads * splits if needs_merge else 0, device=q.device)
    rank_block, rope_block = max(triton.next_power_of_2(rank), 16), max(triton.next_power_of_2(rope), 16)
    head_tiles = triton.cdiv(heads, LANES // queries)
    for part in plan.parts:
        positions, tables = plan.positions[part.rows], plan.block_tables[part.rows]
        to, num_rows = out[part.rows], part.rows.stop - part.rows.start
        split_kernel[((len(part.items) - 1) * head_tiles,)](
            q[part.rows], cache_layer, tables, positions, plan.firsts[part.rows], part.items, partial, lse, to,
            softmax_scale * LOG2_E, cache_layer.shape[0] * plan.block_size, q.stride(0), q.stride(1), out.stride(0),
            out.stride(1), tables.stride(0), splits, num_rows, heads, QUERIES=queries, LANES=LANES, KEYS=KEYS,
            BLOCK=plan.block_size, SPLIT=SPLIT, RANK=rank, ROPE=rope, RANK_BLOCK=rank_block, ROPE_BLOCK=rope_block,
            TILED=rank == rank_block and rope == rope_block, num_warps=8, num_stages=2,
        )  # fmt: skip
        if needs_merge:
            merge_kernel[(num_rows, triton.cdiv(heads, MERGED_HEADS))](
                partial, lse, positions, to, out.stride(0), out.stride(1), splits, heads, SPLIT=SPLIT,
                RANK=rank, RANK_BLOCK=rank_block, HEADS=MERGED_HEADS, num_warps=4,
            )  # fmt: skip
    return out
