"""Kernel calls noted in one step and made again in later ones, without the Python around them.

Between two steps of the same shape only the contents of memory change: what is noted must read and write memory that
stays where it is, and must be kernel calls of the family and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from .ops import Ops


class Tapes:
    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._tapes: dict[Hashable, Callable[[], object]] = {}
        self._is_noting = False

    def run(self, key: Hashable, work: Callable[[], object]) -> None:
        """Does the work, or again what it did under this key. What it runs by this method itself is part of it."""
        if self._is_noting:
            work()
        elif (tape := self._tapes.get(key)) is not None:
            tape()
        else:
            self._note(key, work)

    def forget(self) -> None:
        self._tapes.clear()

    def _note(self, key: Hashable, work: Callable[[], object]) -> None:
        self._is_noting = True
        try:
            tape = self._ops.noted(work)
        finally:
            self._is_noting = False
        if tape is not None:
            self._tapes[key] = tape
