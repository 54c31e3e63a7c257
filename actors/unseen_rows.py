"""The rows that the MTP module has not seen, as nothing was drafted after them: it sees them before it drafts again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.to_device import on_device
from .sequence import Sequence

MAX_STEPS = 64  # that are remembered; what lies further back is given up, which costs acceptance and no token
MAX_ROWS = 64  # of a step's hidden rows that stay for the sake of a few; of more, those few are copied

Rows = tuple[Tensor, int, int]  # of hidden [N, H]: the first one and how many


@dataclass(slots=True)
class Computed:
    """Positions [start, start + num) of a sequence, which are known to stay: rows from `row` on of a step's batch."""

    sequence: Sequence
    start: int
    num: int
    row: int
    absorbed: bool
    has_sampled: bool  # the token after them is the sequence's newest


class UnseenRows:
    """Step by step and not sequence by sequence: while nobody drafts, remembering a step costs next to nothing."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Tensor, list[Computed]]] = deque(maxlen=MAX_STEPS)

    def keep(self, hidden: Tensor, computed: list[Computed]) -> None:
        """hidden: [N, H] of a step, of which the module has seen none of the rows of `computed`."""
        if len(hidden) > MAX_ROWS:
            rows = [row for each in computed for row in range(each.row, each.row + each.num)]
            hidden = hidden.index_select(0, on_device(torch.tensor(rows), hidden.device))
            computed = [replace(each, row=rows.index(each.row)) for each in computed]
        self._steps.append((hidden, computed))

    def before(self, sequence: Sequence, start: int) -> list[Rows]:
        """The sequence's rows that lead without a gap to position `start`, in order."""
        found: list[Rows] = []
        for hidden, computed in reversed(self._steps):
            each = next((each for each in computed if each.sequence is sequence), None)
            if each is None or each.start + each.num != start:
                break
            found.append((hidden, each.row, each.num))
            start = each.start
        return found[::-1]
