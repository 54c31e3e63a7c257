"""Who computes which row: the dispatch index of a layer's (row, slot) pairs, grouped by local expert.

Stable and without atomics in what decides a place: within an expert the pairs stand in their order, so two runs lay out
alike. One launch, a program an expert: each counts all pairs by expert, then places its own. Tiles of up to `tile` rows
never cross from one expert to the next; no shape depends on who goes where, so a captured graph survives it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_TILE = 64
FEW_PAIRS = 512
ALIGNED = 4  # numbers in 16 bytes: what begins elsewhere is another kernel to Triton, compiled when it is first met


class DispatchIndex(NamedTuple):
    """`pair_of_row`: int32 [P], our pairs expert by expert, undefined after the last of them; a tile map int32 [tiles]
    of expert, first row and number of rows (0: nothing to do)."""

    pair_of_row: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_rows: Tensor
    tile: int


@triton.jit(do_not_specialize=["P", "num_tiles"])
def index_kernel(
    expert_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, tile_rows_ptr, P, E, num_tiles,
    TILE: tl.constexpr, SCAN: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """EXPERTS: a power of two above E, so that there is a place to count pairs that are not ours."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, P, SCAN):
        pair = start + tl.arange(0, SCAN)
        chosen = tl.load(expert_ptr + pair, mask=pair < P, other=-1).to(tl.int32)
        counts += tl.histogram(tl.where(chosen < 0, E, chosen), EXPERTS)
    counts = tl.where(every < E, counts, 0)
    tiles = (counts + TILE - 1) // TILE
    count = tl.sum(tl.where(every == expert, counts, 0), 0)
    first_row = tl.sum(tl.where(every < expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(every < expert, tiles, 0), 0)
    written = first_row
    for start in range(0, P, SCAN):
        pair = start + tl.arange(0, SCAN)
        mine = tl.load(expert_ptr + pair, mask=pair < P, other=-1).to(tl.int32) == expert
        ones = mine.to(tl.int32)
        tl.store(pair_ptr + written + tl.cumsum(ones, 0) - ones, pair, mask=mine)
        written += tl.sum(ones, 0)
    for tile in range(0, tl.cdiv(count, TILE)):
        tl.store(tile_expert_ptr + first_tile + tile, expert)
        tl.store(tile_row_ptr + first_tile + tile, first_row + tile * TILE)
        tl.store(tile_rows_ptr + first_tile + tile, tl.minimum(count - tile * TILE, TILE))
    if expert == 0:
        for start in range(0, num_tiles, EXPERTS):
            empty = start + every
            tl.store(
                tile_rows_ptr + empty, tl.zeros_like(every), mask=(empty >= tl.sum(tiles, 0)) & (empty < num_tiles)
            )


def max_tiles(num_pairs: int, num_experts: int, tile: int) -> int:
    """Tiles that P pairs can take, whoever they go to: each expert with pairs has at most one that is not full."""
    busy = min(num_pairs, num_experts)
    return (num_pairs - busy) // tile + busy if num_pairs else 0


def row_tile(num_pairs: int, num_experts: int) -> int:
    """The token tile that fits the mean load, 16 .. 64; any of them gives the same bits."""
    return min(max(triton.next_power_of_2(-(-num_pairs // max(num_experts, 1))), 16), LARGEST_TILE)


def dispatch_index(expert_of_pair: Tensor, num_experts: int, tile: int | None = None) -> DispatchIndex:
    """expert_of_pair: integers [P], an index into the local stack, or -1 for a pair that is not ours.

    `tile`: rows of a tile, a power of two from 16 to 64; if not given, what fits the mean load.
    """
    num_pairs, device = expert_of_pair.numel(), expert_of_pair.device
    tile = row_tile(num_pairs, num_experts) if tile is None else tile
    pair_of_row = torch.empty(num_pairs, dtype=torch.int32, device=device)
    tiles = max_tiles(num_pairs, num_experts, tile)
    tile_map = torch.empty(3, triton.cdiv(tiles, ALIGNED) * ALIGNED, dtype=torch.int32, device=device)
    tile_expert, tile_row, tile_rows = tile_map[:, :tiles].unbind(0)
    index = DispatchIndex(pair_of_row, tile_expert, tile_row, tile_rows, tile)
    if num_pairs:
        index_kernel[(num_experts,)](
            expert_of_pair, *index[:4], num_pairs, num_experts, tiles,
            TILE=tile, SCAN=FEW_PAIRS if num_pairs <= FEW_PAIRS else 4096,
            EXPERTS=triton.next_power_of_2(num_experts + 1), num_warps=8,
        )  # fmt: skip
    return index
