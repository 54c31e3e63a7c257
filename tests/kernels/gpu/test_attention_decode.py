"""MLA decode over a paged cache against float64: NaN in the cache and in fresh memory, shuffled blocks, all lengths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import attention_decode
from braid.kernels.gpu.attention_decode import mla_decode, plan_decode, refresh

BLOCK = 64
SCALE = 0.2
# heads, rank, rope: two tiles of V3's, keys by descriptor in two forms, and sizes that are no powers of two
SIZES = [(66, 512, 64), (4, 64, 16), (5, 40, 8)]


@pytest.fixture(autouse=True)
def _small_splits_and_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of 128 positions; what torch.empty returns is full of NaN."""
    monkeypatch.setattr(attention_decode, "SPLIT", 128)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Sequences:
    """Latents of some sequences in shuffled blocks; every other row of the cache is NaN."""

    def __init__(self, lengths: list[int], width: int, dim: int) -> None:
        blocks = torch.randperm(len(lengths) * width + 2)
        self.tables = blocks[: len(lengths) * width].view(len(lengths), width)
        self.cache = torch.full((len(blocks), BLOCK, dim), torch.nan).bfloat16()
        self.latents = [(torch.randn(length, dim) / 2).bfloat16() for length in lengths]
        for table, latents in zip(self.tables, self.latents, strict=True):
            for position, latent in enumerate(latents):
                self.cache[table[position // BLOCK], position % BLOCK] = latent


def attended(q: Tensor, latents: Tensor, rank: int) -> Tensor:
    """q: [heads, dim] -> float64 [heads, rank]."""
    keys = latents.double()
    return torch.softmax(q.double() @ keys.T * SCALE, dim=-1) @ keys[:, :rank]


@pytest.mark.parametrize(("heads", "rank", "rope"), SIZES)
def test_each_row_attends_to_its_own_sequence_up_to_its_position(heads: int, rank: int, rope: int) -> None:
    torch.manual_seed(heads)
    positions = [70, 130] if rank == 512 else [0, 63, 64, 127, 128, 300]
    sequences = Sequences([position + 1 for position in positions], 5, rank + rope)
    q = torch.randn(len(positions), heads, rank + rope).bfloat16()
    out = torch.full((len(positions), heads, rank), torch.nan).bfloat16()
    plan = plan_decode(torch.tensor(positions), sequences.tables, BLOCK)
    mla_decode(q, sequences.cache, plan, SCALE, rank, out)
    for row, latents in enumerate(sequences.latents):
        torch.testing.assert_close(out[row].double(), attended(q[row], latents, rank), rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize(("heads", "rank", "rope"), SIZES[1:])
def test_a_row_has_the_same_bits_alone(heads: int, rank: int, rope: int) -> None:
    torch.manual_seed(heads)
    positions = torch.tensor([128, 40, 299])
    sequences = Sequences([129, 41, 300], 5, rank + rope)
    q = torch.randn(3, heads, rank + rope).bfloat16()
    together = mla_decode(q, sequences.cache, plan_decode(positions, sequences.tables, BLOCK), SCALE, rank)
    for row in range(3):
        at = slice(row, row + 1)
        plan = plan_decode(positions[at], sequences.tables[at], BLOCK)
        assert torch.equal(mla_decode(q[at], sequences.cache, plan, SCALE, rank)[0], together[row])


@pytest.mark.parametrize(("rank", "rope"), [(64, 16), (40, 8)])
@pytest.mark.parametrize("queries", [2, 4])
def test_rows_of_one_sequence_have_the_same_bits_in_one_tile(queries: int, rank: int, rope: int) -> None:
    torch.manual_seed(queries)
    last = [66, 130]  # pairs and fours that begin on one side of a tile's or a split's end and end on the other
    sequences = Sequences([position + 1 for position in last], 3, rank + rope)
    positions = torch.tensor([position - queries + 1 + step for position in last for step in range(queries)])
    tables = sequences.tables.repeat_interleave(queries, 0)
    q = torch.randn(len(positions), 3, rank + rope).bfloat16()
    one = mla_decode(q, sequences.cache, plan_decode(positions, tables, BLOCK), SCALE, rank)
    grouped = mla_decode(q, sequences.cache, plan_decode(positions, tables, BLOCK, queries), SCALE, rank)
    assert torch.equal(one, grouped)


def test_rows_that_do_not_fit_at_once_go_one_part_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    positions = torch.tensor([5, 200, 128, 1, 290])
    sequences = Sequences([6, 201, 129, 2, 291], 5, 80)
    q = torch.randn(5, 4, 80).bfloat16()
    whole = mla_decode(q, sequences.cache, plan_decode(positions, sequences.tables, BLOCK), SCALE, 64)
    monkeypatch.setattr(attention_decode, "MAX_ITEMS", 6)  # two rows of three splits
    plan = plan_decode(positions, sequences.tables, BLOCK)
    assert [part.rows for part in plan.parts] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert torch.equal(mla_decode(q, sequences.cache, plan, SCALE, 64), whole)


def test_a_plan_follows_positions_that_change_in_place() -> None:
    torch.manual_seed(4)
    positions = torch.tensor([130, 3])
    sequences = Sequences([140, 140], 3, 80)
    plan = plan_decode(positions, sequences.tables, BLOCK)
    items = plan.parts[0].items
    assert items[:4].tolist() == [3, 0, 1, 2]  # row 0 has two splits, row 1 has one, of two each
    positions.copy_(torch.tensor([-1, 139]))  # a row that only fills the batch up
    refresh(plan)
    assert items[:3].tolist() == [2, 2, 3]
    q, out = torch.randn(2, 4, 80).bfloat16(), torch.full((2, 4, 64), torch.nan).bfloat16()
    mla_decode(q, sequences.cache, plan, SCALE, 64, out)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1].double(), attended(q[1], sequences.latents[1], 64), rtol=2e-2, atol=4e-3)
