"""The hidden rows that are held for the MTP module while a sequence drafts nothing."""

from __future__ import annotations

import torch

from braid.actors.drafting import MAX_HELD_ROWS, Drafting
from braid.actors.speculation import Acceptance


def test_more_rows_than_are_held_are_given_up() -> None:
    drafting, hidden = Drafting(Acceptance()), torch.zeros(1, 2)
    for position in range(10, 10 + MAX_HELD_ROWS + 7):
        drafting.hold(position, (hidden, 0, 1))
    assert len(drafting.take(drafting.end)) == MAX_HELD_ROWS
    assert drafting.take(drafting.end) == []
    drafting.hold(5, (hidden, 0, 1))
    assert drafting.take(7) == [], "rows of other positions"


def test_of_a_large_batch_only_the_rows_held_stay() -> None:
    drafting, hidden = Drafting(Acceptance()), torch.zeros(500, 2)
    drafting.hold(3, (hidden, 7, 2))
    ((rows, first, num),) = drafting.take(5)
    assert (rows.shape[0], first, num) == (2, 0, 2)
