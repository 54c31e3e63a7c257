"""Which worker probably holds which prompt blocks, from what was sent there. Pure.

A guess, and meant as one: a worker that has evicted a block computes it again, which costs time and no token. Asking
the workers instead would have every load report grow with their caches, and would be as old as the last report.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixTable:
    """Keys (router/prefix_keys.py) by worker, the ones used longest ago forgotten first, as the workers' caches do."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[bytes, None]] = {}

    def hits(self, worker: str, keys: Sequence[bytes]) -> int:
        """How many leading blocks the worker is likely to hold."""
        held = self._held.get(worker, OrderedDict())
        return next((place for place, key in enumerate(keys) if key not in held), len(keys))

    def note(self, worker: str, keys: Sequence[bytes], max_blocks: int) -> None:
        """The worker computes or receives these blocks; it has room for `max_blocks` in all."""
        held = self._held.setdefault(worker, OrderedDict())
        for key in reversed(keys):  # the last blocks go first: without them, those before still serve
            held[key] = None
            held.move_to_end(key)
        while len(held) > max_blocks:
            held.popitem(last=False)

    def forget(self, worker: str) -> None:
        self._held.pop(worker, None)
