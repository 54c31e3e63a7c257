"""MLA over the paged latent cache in the absorbed form: decode, replay and the rows of a draft's verification.

Keys are visited in splits of a constant number of absolute positions, in ascending tiles; a second kernel merges the
splits in ascending order. So a row's bits follow from its own position and its own cache, whoever else is in the batch
(DESIGN law 5). Rows of one sequence that come together share each tile: their heads lie side by side on wgmma's M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 1024  # a deployment's constant: another length rounds otherwise
KEYS = 64
LANES = 64  # heads x rows of a tile: wgmma's M, whatever the model's heads, so that one instruction does them all


@triton.jit
def attend_tile(q_latent, q_rope, latent, k_rope, key, last, scale_log2, highest, total, sums):
    """One tile of keys joins the running softmax of every lane; a lane that sees none of it stays as it is."""
    scores = (tl.dot(q_latent, latent.T) + tl.dot(q_rope, k_rope.T)) * scale_log2
    scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # no inf is taken from an inf
    keep = tl.exp2(highest - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * keep + tl.sum(weights, 1)
    sums = tl.dot(weights.to(latent.dtype), latent, sums * keep[:, None])
    return new, total, sums


@triton.jit
def split_kernel(
    q_ptr, cache_ptr, table_ptr, position_ptr, partial_ptr, lse_ptr, scale_log2, num_rows, num_blocks,
    q_row, q_head, table_row, H,
    QUERIES: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    RANK: tl.constexpr, ROPE: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: head tiles (fastest, they share the keys in L2), sequences, splits. QUERIES rows follow one another."""
    heads_each: tl.constexpr = LANES // QUERIES
    first_row = tl.program_id(1) * QUERIES
    split = tl.program_id(2)
    lane = tl.arange(0, LANES)
    row = first_row + lane // heads_each
    head = tl.program_id(0) * heads_each + lane % heads_each
    inside = (head < H) & (row < num_rows)
    last = tl.load(position_ptr + row, mask=inside, other=-1)
    start = split * SPLIT
    stop = tl.minimum(tl.max(last, 0) + 1, start + SPLIT)
    if start < stop:
        rank = tl.arange(0, RANK)
        rope = RANK + tl.arange(0, ROPE)
        query = q_ptr + row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head
        q_latent = tl.load(query + rank[None, :], mask=inside[:, None], other=0.0)
        q_rope = tl.load(query + rope[None, :], mask=inside[:, None], other=0.0)
        shape = num_blocks * BLOCK
        latents = tl.make_tensor_descriptor(cache_ptr, [shape, RANK + ROPE], [RANK + ROPE, 1], [KEYS, RANK])
        ropes = tl.make_tensor_descriptor(cache_ptr, [shape, RANK + ROPE], [RANK + ROPE, 1], [KEYS, ROPE])
        table = table_ptr + first_row.to(tl.int64) * table_row
        highest = tl.full((LANES,), float("-inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        sums = tl.zeros((LANES, RANK), tl.float32)
        whole = start + (stop - start) // KEYS * KEYS
        for at in range(start, whole, KEYS):
            place = tl.load(table + at // BLOCK) * BLOCK + at % BLOCK
            latent = latents.load([place, 0])
            k_rope = ropes.load([place, RANK])
            key = at + tl.arange(0, KEYS)
            highest, total, sums = attend_tile(
                q_latent, q_rope, latent, k_rope, key, last, scale_log2, highest, total, sums
            )
        if whole < stop:  # what lies past the end of the sequence may be NaN, and 0 * NaN is NaN: it is not read
            key = whole + tl.arange(0, KEYS)
            place = tl.load(table + whole // BLOCK).to(tl.int64) * BLOCK + key % BLOCK
            base = cache_ptr + place[:, None] * (RANK + ROPE)
            latent = tl.load(base + rank[None, :], mask=(key < stop)[:, None], other=0.0)
            k_rope = tl.load(base + rope[None, :], mask=(key < stop)[:, None], other=0.0)
            highest, total, sums = attend_tile(
                q_latent, q_rope, latent, k_rope, key, last, scale_log2, highest, total, sums
            )
        seen = inside & (last >= start)
        where = (row.to(tl.int64) * H + head) * MAX_SPLITS + split
        tl.store(partial_ptr + where[:, None] * RANK + rank[None, :], sums / total[:, None], mask=seen[:, None])
        tl.store(lse_ptr + where, highest + tl.log2(total), mask=seen)


@triton.jit
def merge_kernel(
    partial_ptr, lse_ptr, position_ptr, out_ptr, out_row, out_head, H,
    SPLIT: tl.constexpr, RANK: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    rank = tl.arange(0, RANK)
    highest = float("-inf")
    total = 0.0
    sums = tl.zeros((RANK,), tl.float32)
    for split in range(tl.load(position_ptr + row) // SPLIT + 1):  # ascending, always
        where = (row * H + head) * MAX_SPLITS + split
        lse = tl.load(lse_ptr + where)
        new = tl.maximum(highest, lse)
        keep = tl.exp2(highest - new)
        weight = tl.exp2(lse - new)
        sums = sums * keep + weight * tl.load(partial_ptr + where * RANK + rank)
        total = total * keep + weight
        highest = new
    tl.store(out_ptr + row * out_row + head * out_head + rank, (sums / total).to(out_ptr.dtype.element_ty))


def mla_decode(
    q: Tensor, cache_layer: Tensor, positions: Tensor, block_tables: Tensor, softmax_scale: float, kv_lora_rank: int,
    queries: int = 1, max_length: int | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q: bf16 [R, heads, rank + rope], cache_layer: [blocks, block_size, rank + rope], positions: int32 [R], each row
    sees keys 0 .. position, block_tables: int32 [R, width] -> attended latents [R, heads, rank].

    `queries`: so many consecutive rows belong to one sequence and share its table; a power of two that divides R.
    `max_length` bounds position + 1 (default: what the tables can hold); a captured graph keeps it.
    """
    rows, heads, width = q.shape
    num_blocks, block_size, _ = cache_layer.shape
    assert block_size % KEYS == 0, f"a block of {block_size} tokens is not made of tiles of {KEYS}"
    assert rows % queries == 0, f"{rows} rows are not made of groups of {queries}"
    splits = triton.cdiv(max_length or block_tables.shape[1] * block_size, SPLIT)
    out = q.new_empty(rows, heads, kv_lora_rank) if out is None else out
    if rows == 0:
        return out
    partial = torch.empty(rows, heads, splits, kv_lora_rank, device=q.device)
    lse = torch.empty(rows, heads, splits, device=q.device)
    split_kernel[(triton.cdiv(heads, LANES // queries), rows // queries, splits)](
        q, cache_layer, block_tables, positions, partial, lse, softmax_scale * 1.4426950408889634, rows, num_blocks,
        q.stride(0), q.stride(1), block_tables.stride(0), heads,
        QUERIES=queries, LANES=LANES, KEYS=KEYS, BLOCK=block_size, SPLIT=SPLIT, RANK=kv_lora_rank,
        ROPE=width - kv_lora_rank, MAX_SPLITS=splits, num_warps=8, num_stages=2,
    )  # fmt: skip
    merge_kernel[(rows, heads)](
        partial, lse, positions, out, out.stride(0), out.stride(1), heads,
        SPLIT=SPLIT, RANK=kv_lora_rank, MAX_SPLITS=splits, num_warps=4,
    )  # fmt: skip
    return out
