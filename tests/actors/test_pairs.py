"""The pairs of a dispatch: the native forms against the numpy ones that define them, and what neither accepts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from braid.actors import pairs
from braid.actors.pairs import are_within, decode, encode, experts_of, split, x_of

HIDDEN = 6


class Case(NamedTuple):
    experts: pairs.Ints
    slots: pairs.Ints
    owner_of: pairs.Ints
    num_owners: int
    top_k: int
    x: torch.Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, top_k, num_experts, num_owners = (draw(st.integers(1, most)) for most in (9, 4, 12, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts = rng.integers(0, num_experts, rows * top_k)
    slots = np.flatnonzero(rng.random(rows * top_k) < draw(st.sampled_from((0.2, 0.7, 1.0))))
    owner_of = rng.integers(-1, num_owners, num_experts)
    x = torch.from_numpy(rng.standard_normal((rows, HIDDEN))).to(draw(st.sampled_from((torch.float32, torch.bfloat16))))
    return Case(experts, slots, owner_of, num_owners, top_k, x)


@pytest.fixture(params=["native", "numpy"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "HAS_NATIVE", request.param == "native")


@given(case=cases())
def test_the_native_forms_give_what_the_numpy_forms_define(case: Case) -> None:
    told = []
    for has_native in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs, "HAS_NATIVE", has_native)
            order, counts = split(case.experts, case.slots, case.owner_of, case.num_owners)
            out = np.zeros(8 * len(case.slots) + case.x.nbytes, dtype=np.uint8)
            num_rows = encode(case.x, case.experts, case.slots, case.top_k, out)
            rows, places = (np.zeros(len(case.slots), dtype=np.int64) for _ in range(2))
            is_resident = decode(out.data, len(case.slots), 3, case.owner_of, rows, places)
            is_sound = are_within(out.data, len(case.slots), num_rows, len(case.owner_of))
        told.append([order.tolist(), counts, num_rows, out.tobytes(), is_resident, rows.tolist(), places.tolist()])
        assert is_sound
    assert told[0] == told[1]


@given(case=cases())
def test_every_pair_arrives_with_its_row_and_every_slot_has_one_owner(case: Case) -> None:
    order, counts = split(case.experts, case.slots, case.owner_of, case.num_owners)
    assert sorted(order) == sorted(case.slots)
    owners = case.owner_of[case.experts[order]]
    assert owners.tolist() == [owner for owner, num in enumerate(counts, start=-1) for _ in range(num)]
    out = np.zeros(8 * len(case.slots) + case.x.nbytes, dtype=np.uint8)
    num_rows = encode(case.x, case.experts, case.slots, case.top_k, out)
    assert num_rows == len(set((case.slots // case.top_k).tolist()))
    end = 8 * len(case.slots) + num_rows * HIDDEN * case.x.itemsize
    rows, places = (np.zeros(len(case.slots), dtype=np.int64) for _ in range(2))
    assert decode(out.data, len(case.slots), 0, np.arange(len(case.owner_of)), rows, places)
    x = x_of(out.data[:end], len(case.slots), case.x.dtype, HIDDEN)
    assert torch.equal(x[rows], case.x[case.slots // case.top_k])
    assert places.tolist() == experts_of(out.data, len(case.slots)).tolist() == case.experts[case.slots].tolist()


@pytest.mark.usefixtures("form")
def test_pairs_beyond_the_rows_or_the_experts_are_found() -> None:
    def payload(row: int, expert: int) -> memoryview:
        return np.array([0, row, 1, expert], dtype=np.int32).view(np.uint8).data

    assert are_within(payload(1, 3), 2, num_rows=2, num_experts=4)
    for row, expert in ((2, 3), (-1, 3), (1, 4), (1, -1)):
        assert not are_within(payload(row, expert), 2, num_rows=2, num_experts=4)
    with pytest.raises(ValueError, match=r"elements|buffer"):
        are_within(payload(0, 0), 3, num_rows=2, num_experts=4)


@pytest.mark.usefixtures("form")
def test_an_expert_without_a_place_is_told() -> None:
    payload = np.array([0, 0, 0, 1], dtype=np.int32).view(np.uint8).data
    rows, places = (np.zeros(2, dtype=np.int64) for _ in range(2))
    assert not decode(payload, 2, 5, np.array([7, -1]), rows, places)
    assert (rows.tolist(), places.tolist()) == ([5, 5], [7, -1])


@pytest.mark.usefixtures("form")
def test_a_slot_or_an_expert_that_there_is_not_is_an_error() -> None:
    with pytest.raises(IndexError):
        split(np.array([0, 9]), np.arange(2), np.array([0, 0]), 1)
    with pytest.raises(IndexError):
        split(np.array([0, 0]), np.arange(3), np.array([0, 0]), 1)
