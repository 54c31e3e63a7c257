"""MLA decode over a paged cache against float64: NaN in the cache and in fresh memory, shuffled blocks, all lengths."""

from __future__ import annotations

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
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 positions."""
    monkeypatch.setattr(attention_decode, "SPLIT", 128)


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
    plan = plan_decode(torch.tensor(positions), sequences.tables, BLOCK, heads)
    mla_decode(q, sequences.cache, plan, SCALE, rank, out)
    for row, latents in enumerate(sequences.latents):
        torch.testing.assert_close(out[row].double(), attended(q[row], latents, rank), rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize(("heads", "rank", "rope"), SIZES[1:])
def test_a_row_has_the_same_bits_alone(heads: int, rank: int, rope: int) -> None:
    torch.manual_seed(heads)
    positions = torch.tensor([128, 40, 299])
    sequences = Sequences([129, 41, 300], 5, rank + rope)
    q = torch.randn(3, heads, rank + rope).bfloat16()
    together = mla_decode(q, sequences.cache, plan_decode(positions, sequences.tables, BLOCK, heads), SCALE, rank)
    for row in range(3):
        at = slice(row, row + 1)
        plan = plan_decode(positions[at], sequences.tables[at], BLOCK, heads)
        assert torch.equal(mla_decode(q[at], sequences.cache, plan, SCALE, rank)[0], together[row])


# heads, rank, rope: 16 rows a tile, 4 and 2, in both forms of reading keys; and tiles of half a row, as V3's are
SHARING = [(3, 64, 16), (16, 64, 16), (17, 40, 8), (66, 64, 16)]


class Verified:
    """Rows of some sequences as steps verify drafts or replay: `spans`, the first position of each and how many rows.

    The sequences end with their last row: what the cache holds from there on is NaN.
    """

    def __init__(self, spans: list[tuple[int, int]], heads: int, rank: int, rope: int) -> None:
        self.rank = rank
        self.sequences = Sequences([start + num for start, num in spans], 5, rank + rope)
        owners = [sequence for sequence, (_, num) in enumerate(spans) for _ in range(num)]
        self.tables = self.sequences.tables[owners]
        self.latents = [self.sequences.latents[sequence] for sequence in owners]
        self.positions = torch.tensor([start + step for start, num in spans for step in range(num)])
        self.firsts = torch.tensor([owners.index(sequence) for sequence in owners])
        self.q = torch.randn(len(owners), heads, rank + rope).bfloat16()

    def attended(self, rows: slice, shares: bool) -> Tensor:
        q, firsts = self.q[rows], (self.firsts[rows] - rows.start).clamp(min=0) if shares else None
        plan = plan_decode(self.positions[rows], self.tables[rows], BLOCK, q.shape[1], firsts)
        return mla_decode(q, self.sequences.cache, plan, SCALE, self.rank)


@pytest.mark.parametrize(("heads", "rank", "rope"), SHARING)
def test_rows_of_one_sequence_have_the_bits_of_each_alone(heads: int, rank: int, rope: int) -> None:
    """One, two, three and six rows a sequence in one batch, that begin on one side of a tile's or a split's end and end
    on the other."""
    torch.manual_seed(heads)
    verified = Verified([(127, 2), (40, 1), (126, 3), (62, 6)], heads, rank, rope)
    together = verified.attended(slice(0, 12), shares=True)
    assert torch.equal(together, verified.attended(slice(0, 12), shares=False))
    for begin, end in ((0, 1), (1, 2), (4, 5), (7, 9), (8, 12)):  # rows of a sequence without those before them
        assert torch.equal(verified.attended(slice(begin, end), shares=True), together[begin:end])
    for row, latents in enumerate(verified.latents):
        expected = attended(verified.q[row], latents[: verified.positions[row] + 1], rank)
        torch.testing.assert_close(together[row].double(), expected, rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize(("heads", "tiles"), [(3, 1), (16, 2), (17, 3), (128, 5)])
def test_tiles_of_the_same_keys_stand_together(heads: int, tiles: int) -> None:
    """Five rows across the end of a split, after one of another sequence: its split, then all tiles' first split."""
    verified = Verified([(3, 1), (126, 5)], heads, 64, 16)
    plan = plan_decode(verified.positions, verified.tables, BLOCK, heads, verified.firsts)
    count, *items = plan.parts[0].items.tolist()
    listed = [(item // plan.splits, item % plan.splits) for item in items[:count]]
    begins = [1 + tile * plan.queries for tile in range(tiles)]
    assert listed == [(0, 0), *[(row, 0) for row in begins], *[(row, 1) for row in begins]]


def test_rows_of_one_sequence_may_fall_into_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    verified = Verified([(20, 1), (126, 6), (7, 2)], 16, 64, 16)
    whole = verified.attended(slice(0, 9), shares=True)
    monkeypatch.setattr(attention_decode, "MAX_ITEMS", 9)  # three rows of three splits
    plan = plan_decode(verified.positions, verified.tables, BLOCK, 16, verified.firsts)
    assert [part.rows for part in plan.parts] == [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert [part.items[0].item() for part in plan.parts] == [2, 2, 3]
    assert torch.equal(mla_decode(verified.q, verified.sequences.cache, plan, SCALE, 64), whole)


def test_rows_that_do_not_fit_at_once_go_one_part_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    positions = torch.tensor([5, 200, 128, 1, 290])
    sequences = Sequences([6, 201, 129, 2, 291], 5, 80)
    q = torch.randn(5, 4, 80).bfloat16()
    whole = mla_decode(q, sequences.cache, plan_decode(positions, sequences.tables, BLOCK, 4), SCALE, 64)
    monkeypatch.setattr(attention_decode, "MAX_ITEMS", 6)  # two rows of three splits
    plan = plan_decode(positions, sequences.tables, BLOCK, 4)
    assert [part.rows for part in plan.parts] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert torch.equal(mla_decode(q, sequences.cache, plan, SCALE, 64), whole)


def test_a_plan_follows_positions_that_change_in_place() -> None:
    torch.manual_seed(4)
    positions = torch.tensor([130, 3])
    sequences = Sequences([140, 140], 3, 80)
    firsts = torch.tensor([0, 1])
    plan = plan_decode(positions, sequences.tables, BLOCK, 4, firsts)
    items = plan.parts[0].items
    assert items[:4].tolist() == [3, 0, 1, 2]  # row 0 has two splits, row 1 has one, of two each
    positions.copy_(torch.tensor([-1, 139]))  # a row that only fills the batch up
    refresh(plan)
    assert items[:3].tolist() == [2, 2, 3]
    q, out = torch.randn(2, 4, 80).bfloat16(), torch.full((2, 4, 64), torch.nan).bfloat16()
    mla_decode(q, sequences.cache, plan, SCALE, 64, out)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1].double(), attended(q[1], sequences.latents[1], 64), rtol=2e-2, atol=4e-3)
