"""Memory for the rows of experts: taken, given back, used again; never freed, because noted kernel calls name it."""

from __future__ import annotations

from torch import Tensor


class RowMemory:
    def __init__(self) -> None:
        self._all: list[Tensor] = []  # also what was taken by a step that broke off, and never comes back
        self._spare: list[Tensor] = []

    def take(self, num_rows: int, like: Tensor) -> Tensor:
        """[num_rows or more, width] where `like` is, [M, width]: the least of the spare memory that is enough."""
        enough = [memory for memory in self._spare if len(memory) >= num_rows]
        if not enough:
            num_rows = max(num_rows, 2 * max(map(len, self._spare), default=0))  # else it grows row by row
            self._all.append(like.new_empty(num_rows, like.shape[1]))
            return self._all[-1]
        memory = min(enough, key=len)
        self._spare = [other for other in self._spare if other is not memory]
        return memory

    def give_back(self, memory: Tensor) -> None:
        self._spare.append(memory)
