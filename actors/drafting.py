"""What one sequence's drafts have brought, and the hidden rows that the MTP module has still to see of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .speculation import Acceptance

MAX_HELD_ROWS = 64  # hidden rows of a sequence kept while nothing is drafted; older ones are given up

Rows = tuple[Tensor, int, int]  # of hidden [N, H]: the first one and how many


@dataclass(slots=True)
class Drafting:
    """One sequence: what its drafts have brought, and the hidden rows before `end` that the module has not seen yet."""

    acceptance: Acceptance
    num_drafted: int = 0
    num_accepted: int = 0
    end: int = 0
    _held: list[Rows] = field(default_factory=list)

    def hold(self, start: int, rows: Rows) -> None:
        hidden, first, num = rows
        if start != self.end:
            self._held.clear()
        if len(hidden) > MAX_HELD_ROWS:  # or all the rows of a prompt would stay for the sake of one
            rows = hidden[first : first + num].clone(), 0, num
        self._held.append(rows)
        self.end = start + num
        del self._held[:-MAX_HELD_ROWS]

    def take(self, start: int) -> list[Rows]:
        """The held rows right before `start`, in order."""
        held, self._held = self._held, []
        return held if self.end == start else []
