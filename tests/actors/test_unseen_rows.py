"""The hidden rows that are remembered for the MTP module while a sequence drafts nothing."""

from __future__ import annotations

from typing import cast

import torch

from braid.actors.sequence import Sequence
from braid.actors.unseen_rows import MAX_ROWS, MAX_STEPS, Computed, UnseenRows

FIRST, SECOND = (cast(Sequence, object()) for _ in range(2))


def computed(sequence: Sequence, start: int, num: int = 1, row: int = 0) -> Computed:
    return Computed(sequence, start, num, row, absorbed=True, has_sampled=True)


def test_rows_that_lead_to_a_position_come_in_order_and_of_one_sequence() -> None:
    unseen, steps = UnseenRows(), [torch.full((4, 2), step) for step in range(3)]
    unseen.keep(steps[0], [computed(FIRST, 10), computed(SECOND, 50, row=1)])
    unseen.keep(steps[1], [computed(SECOND, 51), computed(FIRST, 11, num=2, row=1)])
    unseen.keep(steps[2], [computed(FIRST, 13)])
    found = unseen.before(FIRST, 14)
    assert [rows[1:] for rows in found] == [(0, 1), (1, 2), (0, 1)]
    assert [int(rows[0][0, 0]) for rows in found] == [0, 1, 2]
    assert unseen.before(SECOND, 52) == [], "it had no part in the last step"


def test_what_lies_before_a_gap_is_not_found() -> None:
    unseen, hidden = UnseenRows(), torch.zeros(1, 2)
    for start in (3, 4, 6, 7):
        unseen.keep(hidden, [computed(FIRST, start)])
    assert len(unseen.before(FIRST, 8)) == 2
    assert unseen.before(FIRST, 9) == unseen.before(SECOND, 8) == []


def test_steps_further_back_are_given_up() -> None:
    unseen, hidden = UnseenRows(), torch.zeros(1, 2)
    for start in range(MAX_STEPS + 7):
        unseen.keep(hidden, [computed(FIRST, start)])
    assert len(unseen.before(FIRST, MAX_STEPS + 7)) == MAX_STEPS


def test_of_a_large_batch_only_the_rows_that_are_meant_stay() -> None:
    unseen, hidden = UnseenRows(), torch.arange(2.0 * (MAX_ROWS + 1)).view(-1, 2)
    unseen.keep(hidden, [computed(FIRST, 3, num=2, row=7), computed(SECOND, 9, row=20)])
    ((rows, first, num),) = unseen.before(FIRST, 5)
    assert len(rows) == 3
    assert torch.equal(rows[first : first + num], hidden[7:9])
    ((rows, first, num),) = unseen.before(SECOND, 10)
    assert torch.equal(rows[first : first + num], hidden[20:21])
