"""Who computes which row: the dispatch index of a layer's (token, slot) pairs, grouped by local expert.

Stable and without atomics: within an expert the pairs stand in (token, slot) order, so two runs lay out alike. Each
expert's rows begin at a multiple of 16, the smallest token tile; tiles of `TILE` rows never cross from one to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGN = 16
SCAN = 1024  # pairs looked at in one piece


class DispatchIndex(NamedTuple):
    """`pair_of_row`: int32 [capacity], -1 where a group is filled up; a tile map int32 [tiles] of expert, first row and
    number of rows (0: nothing to do), the same length whatever the load, so that a captured graph survives it."""

    pair_of_row: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_rows: Tensor
    tile: int

    @property
    def capacity(self) -> int:
        return self.pair_of_row.shape[0]


@triton.jit
def count_kernel(expert_ptr, count_ptr, P, SCAN: tl.constexpr):
    """Pairs of each local expert; one program an expert."""
    expert = tl.program_id(0)
    count = 0
    for start in range(0, P, SCAN):
        pair = start + tl.arange(0, SCAN)
        mine = tl.load(expert_ptr + pair, mask=pair < P, other=-1) == expert
        count += tl.sum(mine.to(tl.int32), 0)
    tl.store(count_ptr + expert, count)


@triton.jit
def place_kernel(
    expert_ptr, count_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr, P, E, num_tiles,
    ALIGN: tl.constexpr, TILE: tl.constexpr, SCAN: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes one expert's rows and tiles; its places follow from the counts of those before it."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    counts = tl.load(count_ptr + every, mask=every < E, other=0)
    padded = (counts + ALIGN - 1) // ALIGN * ALIGN
    tiles = (counts + TILE - 1) // TILE
    first_row = tl.sum(tl.where(every < expert, padded, 0), 0)
    first_tile = tl.sum(tl.where(every < expert, tiles, 0), 0)
    count = tl.sum(tl.where(every == expert, counts, 0), 0)
    written = first_row
    for start in range(0, P, SCAN):
        pair = start + tl.arange(0, SCAN)
        mine = tl.load(expert_ptr + pair, mask=pair < P, other=-1) == expert
        ones = mine.to(tl.int32)
        tl.store(pair_ptr + written + tl.cumsum(ones, 0) - ones, pair, mask=mine)
        written += tl.sum(ones, 0)
    for tile in range(0, tl.cdiv(count, TILE)):
        tl.store(tile_expert_ptr + first_tile + tile, expert)
        tl.store(tile_row_ptr + first_tile + tile, first_row + tile * TILE)
        tl.store(tile_rows_ptr + first_tile + tile, tl.minimum(count - tile * TILE, TILE))


def max_rows(num_pairs: int, num_experts: int) -> int:
    """Rows that P pairs can take, whoever they go to: each expert with pairs wastes at most 15."""
    busy = min(num_pairs, num_experts)
    return -(-(num_pairs + busy * (ALIGN - 1)) // ALIGN) * ALIGN


def max_tiles(num_pairs: int, num_experts: int, tile: int) -> int:
    """Tiles that P pairs can take: each expert with pairs has at most one that is not full."""
    busy = min(num_pairs, num_experts)
    return (num_pairs - busy) // tile + busy if num_pairs else 0


def row_tile(num_pairs: int, num_experts: int) -> int:
    """The token tile that fits the mean load; any of them gives the same bits."""
    return min(max(triton.next_power_of_2(-(-num_pairs // max(num_experts, 1))), 16), 64)


def dispatch_index(expert_of_pair: Tensor, num_experts: int, tile: int) -> DispatchIndex:
    """expert_of_pair: int32 [P], an index into the local stack, or -1 for a pair that is not ours."""
    num_pairs, device = expert_of_pair.numel(), expert_of_pair.device
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    pair_of_row = torch.full((max_rows(num_pairs, num_experts),), -1, dtype=torch.int32, device=device)
    tile_map = torch.zeros(3, max_tiles(num_pairs, num_experts, tile), dtype=torch.int32, device=device)
    tile_expert, tile_row, tile_rows = tile_map.unbind(0)
    index = DispatchIndex(pair_of_row, tile_expert, tile_row, tile_rows, tile)
    if num_pairs:
        count_kernel[(num_experts,)](expert_of_pair, counts, num_pairs, SCAN=SCAN, num_warps=4)
        place_kernel[(num_experts,)](
            expert_of_pair, counts, *index[:4], num_pairs, num_experts, tile_map.shape[1],
            ALIGN=ALIGN, TILE=tile, SCAN=SCAN, EXPERTS=triton.next_power_of_2(num_experts), num_warps=4,
        )  # fmt: skip
    return index
