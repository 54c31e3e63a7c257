"""The dispatch index: stable, complete, and of a size that the load does not decide."""

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import index

E = 5
LOADS = {
    "mixed": [2, 0, -1, 2, 2, 1, 0, 2, -1, 4] * 9,
    "one expert has all": [3] * 70,
    "nothing is ours": [-1] * 20,
    "one pair": [1],
    "two pieces": [4, -1, 0, 4, 2] * 250,
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairs_stand_expert_by_expert_in_their_order(load: str, tile: int, dtype: torch.dtype) -> None:
    if load == "two pieces" and (tile, dtype) != (16, torch.int64):
        return
    chosen = torch.tensor(LOADS[load], dtype=dtype)
    found = index.dispatch_index(chosen, E, tile)
    expected = [(chosen == expert).nonzero().flatten().tolist() for expert in range(E)]
    flat = [pair for pairs in expected for pair in pairs]
    assert found.pair_of_row[: len(flat)].tolist() == flat
    assert found.tile == tile
    assert len(found.tile_rows) == index.max_tiles(len(chosen), E, tile)
    assert rows_of_tiles(found) == [(expert, at) for expert, pairs in enumerate(expected) for at in range(len(pairs))]
    used = sum(-(-len(pairs) // tile) for pairs in expected)
    assert (found.tile_rows[used:] == 0).all()


def rows_of_tiles(found: index.DispatchIndex) -> list[tuple[int, int]]:
    """(expert, place within its rows) of every row that a tile covers, in the tiles' order."""
    rows: list[tuple[int, int]] = []
    firsts: dict[int, int] = {}
    for expert, row, num in torch.stack(found[1:4]).t().tolist():
        if num:
            first = firsts.setdefault(expert, row)
            rows += [(expert, row - first + place) for place in range(num)]
    return rows


def test_memory_of_other_pairs_stays() -> None:
    """Places after our last pair are not written: another index in the same memory would show it."""
    chosen = torch.tensor([0, -1, 1, -1, 0])
    memory = torch.full((5,), -7, dtype=torch.int32)
    found = index.dispatch_index(chosen, 2)
    index_into(memory, chosen, found)
    assert memory.tolist() == [0, 4, 2, -7, -7]


def index_into(memory: Tensor, chosen: Tensor, found: index.DispatchIndex) -> None:
    index.index_kernel[(2,)](
        chosen, memory, *found[1:4], 5, 2, len(found.tile_rows), TILE=found.tile, SCAN=512, EXPERTS=4
    )


def test_the_tile_fits_the_mean_load() -> None:
    assert [index.row_tile(pairs, 8) for pairs in (1, 128, 129, 256, 257, 4096)] == [16, 16, 32, 32, 64, 64]
    assert index.max_tiles(0, 8, 16) == 0
    assert len(index.dispatch_index(torch.zeros(0), 8).tile_rows) == 0
    assert index.max_tiles(8, 8, 16) == 8
    assert index.max_tiles(17, 1, 16) == 2
