"""MLA over the paged latent cache: the MHA form for prompt rows, the absorbed form for generated rows.

Invariant: a row's bits depend on its own position and its own sequence's cache only. Keys are visited in splits of 256
absolute positions, and each row merges its splits in ascending order by online softmax in fp32. A row visits only
splits of which it sees something; cache rows that it may not see are replaced (by zeros, or by one that it sees),
because they can hold NaN and 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ROW_MULTIPLE, batched_matmul, linear

KV_SPLIT = 256
QUERY_GROUP = 256  # query rows that go through one product
GATHER_FLOATS = 1 << 20  # bound on the cache rows gathered at once in the absorbed form


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Positions start .. start + num - 1 of one sequence; everything before them is in the cache, and so are they."""

    start: int
    num: int
    split_blocks: tuple[Tensor, ...]  # int64 [KV_SPLIT / block_size] each

    @property
    def end(self) -> int:
        return self.start + self.num


@dataclass(frozen=True, slots=True)
class DecodeSplit:
    """Some rows and a split of which they see something: all of it (hidden is None), or all but some last keys."""

    rows: Tensor  # int64 [R]
    slots: Tensor  # int64 [R * KV_SPLIT]; for a hidden key, that of the split's first
    hidden: Tensor | None  # bool [R, 1, KV_SPLIT]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Ascending splits; one split may come in several parts, so that what is gathered at once stays bounded."""

    splits: tuple[DecodeSplit, ...]
    gathered: Tensor  # fp32 [most slots of a split, latent_dim]: every layer's, as fresh memory costs more than a copy


def plan_prefill(start: int, num: int, block_table: Sequence[int], block_size: int) -> PrefillPlan:
    num_splits = -(-(start + num) // KV_SPLIT)
    table = _padded_table([block_table], [start + num - 1], num_splits, block_size)[0]
    return PrefillPlan(start, num, tuple(table.view(num_splits, -1)))


def plan_decode(
    positions: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int, latent_dim: int
) -> DecodePlan:
    """One row a position; rows of one sequence (replay, MTP) repeat its block table."""
    row_limit = max(GATHER_FLOATS // (KV_SPLIT * latent_dim), 1)
    num_splits = max(positions) // KV_SPLIT + 1
    table = _padded_table(block_tables, positions, num_splits, block_size).view(len(positions), num_splits, -1)
    last_seen = torch.tensor(positions)[:, None]
    key = torch.arange(KV_SPLIT)
    splits = []
    for split in range(num_splits):
        every = (last_seen[:, 0] >= split * KV_SPLIT).nonzero().flatten()
        for rows in torch.split(every, row_limit):
            hidden = split * KV_SPLIT + key > last_seen[rows]
            seen_key = key.masked_fill(hidden, 0)
            slots = table[rows, split].gather(1, seen_key // block_size) * block_size + seen_key % block_size
            splits.append(DecodeSplit(rows, slots.flatten(), hidden[:, None] if hidden.any() else None))
    gathered = torch.empty(min(row_limit, len(positions)) * KV_SPLIT, latent_dim)
    return DecodePlan(tuple(splits), gathered)


def _padded_table(
    block_tables: Sequence[Sequence[int]], positions: Sequence[int], num_splits: int, block_size: int
) -> Tensor:
    """[rows, num_splits * KV_SPLIT / block_size]; places past a table's end name block 0, whose content is masked."""
    assert KV_SPLIT % block_size == 0, f"a block of {block_size} tokens does not divide a split of {KV_SPLIT}"
    width = num_splits * KV_SPLIT // block_size
    table = torch.zeros(len(block_tables), width, dtype=torch.int64)
    for row, (blocks, position) in enumerate(zip(block_tables, positions, strict=True)):
        assert len(blocks) * block_size > position, f"{len(blocks)} blocks do not reach position {position}"
        table[row, : len(blocks)] = torch.tensor(blocks[:width], dtype=torch.int64)
    return table


def mla_prefill(
    q: Tensor, cache_layer: Tensor, kv_b_proj: Tensor, plan: PrefillPlan, softmax_scale: float, v_head_dim: int
) -> Tensor:
    """q: [num, heads, d_nope + d_rope], cache_layer: [blocks, block_size, kv_lora + d_rope],
    kv_b_proj: [heads * (d_nope + d_v), kv_lora] -> [num, heads, d_v] in q's dtype."""
    heads = q.shape[1]
    queries = (q.float() * softmax_scale).transpose(0, 1).contiguous()
    positions = torch.arange(plan.start, plan.end)
    merge = OnlineSoftmax(heads, plan.num, v_head_dim)
    for split, blocks in enumerate(plan.split_blocks):
        first_key = split * KV_SPLIT
        keys, values = _expand_split(cache_layer, kv_b_proj, blocks, plan.end - first_key, heads, v_head_dim)
        for at in range(max(first_key - plan.start, 0), plan.num, QUERY_GROUP):
            rows = slice(at, min(at + QUERY_GROUP, plan.num))
            scores = batched_matmul(queries[:, rows], keys.transpose(1, 2))
            if first_key + KV_SPLIT - 1 > plan.start + at:
                hidden = first_key + torch.arange(KV_SPLIT) > positions[rows, None]
                scores = scores.masked_fill(hidden, float("-inf"))
            merge.add(rows, scores, values)
    return merge.result().transpose(0, 1).to(q.dtype)


def _expand_split(
    cache_layer: Tensor, kv_b_proj: Tensor, blocks: Tensor, num_valid: int, heads: int, v_head_dim: int
) -> tuple[Tensor, Tensor]:
    """fp32 keys [heads, KV_SPLIT, d_nope + d_rope] and values [heads, KV_SPLIT, d_v] of one split."""
    latent = cache_layer.index_select(0, blocks).view(KV_SPLIT, -1)  # indexing takes five times as long on a CPU
    if num_valid < KV_SPLIT:
        latent = latent.masked_fill((torch.arange(KV_SPLIT) >= num_valid)[:, None], 0.0)
    kv_lora_rank = kv_b_proj.shape[1]
    kv = linear(latent[:, :kv_lora_rank], kv_b_proj).view(KV_SPLIT, heads, -1).transpose(0, 1).float()
    k_nope, values = kv[..., :-v_head_dim], kv[..., -v_head_dim:]
    k_rope = latent[:, kv_lora_rank:].float().expand(heads, -1, -1)
    return torch.cat((k_nope, k_rope), dim=-1), values.contiguous()


def mla_decode(q: Tensor, cache_layer: Tensor, plan: DecodePlan, softmax_scale: float, kv_lora_rank: int) -> Tensor:
    """q: [N, heads, kv_lora + d_rope] (absorbed) -> attended latents [N, heads, kv_lora] in q's dtype."""
    num_rows, heads, _ = q.shape
    padded_heads = -(-heads // ROW_MULTIPLE) * ROW_MULTIPLE
    queries = F.pad(q.float() * softmax_scale, (0, 0, 0, padded_heads - heads))
    merge = OnlineSoftmax(num_rows, padded_heads, kv_lora_rank)
    for split in plan.splits:
        latent = plan.gathered[: len(split.slots)]
        latent.copy_(cache_layer.flatten(0, 1).index_select(0, split.slots))
        latent = latent.view(len(split.rows), KV_SPLIT, -1)
        scores = batched_matmul(queries[split.rows], latent.transpose(1, 2))
        if split.hidden is not None:
            scores.masked_fill_(split.hidden, float("-inf"))
        merge.add(split.rows, scores, latent[..., :kv_lora_rank])
    return merge.result()[:, :heads].to(q.dtype)


class OnlineSoftmax:
    """Running softmax-weighted sums of queries [B, M], fed split by split; `at` picks along B (tensor) or M (slice)."""

    def __init__(self, num_batches: int, num_rows: int, value_dim: int) -> None:
        self._highest = torch.full((num_batches, num_rows, 1), float("-inf"))
        self._total = torch.zeros(num_batches, num_rows, 1)
        self._sum = torch.zeros(num_batches, num_rows, value_dim)

    def add(self, at: Tensor | slice, scores: Tensor, values: Tensor) -> None:
        """scores: fp32 [b, m, KV_SPLIT], one finite in each row, overwritten; values: fp32 [b, KV_SPLIT, D]."""
        where = (slice(None), at) if isinstance(at, slice) else (at,)
        highest = torch.maximum(self._highest[where], scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(highest).exp_()
        keep = torch.exp(self._highest[where] - highest)
        self._highest[where] = highest
        self._total[where] = self._total[where] * keep + weights.sum(dim=-1, keepdim=True)
        self._sum[where] = self._sum[where] * keep + batched_matmul(weights, values)

    def result(self) -> Tensor:
        return self._sum / self._total
