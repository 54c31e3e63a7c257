"""Finds stop strings in text that arrives in pieces, and holds back what may still become one.

The result is that of reading character by character: the first stop string to be completed wins, the longest of those
completed at the same character. So it does not depend on how the text was cut into tokens.
"""

from __future__ import annotations


class StopScanner:
    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = tuple(sorted(set(stops), key=len, reverse=True))
        self.held = ""  # the longest end of the text so far that a stop string begins with

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Returns the text that may leave now and the stop string this piece completed, which is never in it.

        Unarmed (before `min_tokens`), a stop string completed by this piece is ordinary text.
        """
        if not self.stops:
            return text, None
        buffer = self.held + text
        if armed and (hit := self._first_completed(buffer, len(self.held))):
            start, stop = hit
            self.held = ""
            return buffer[:start], stop
        keep = self._held_length(buffer)
        self.held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def flush(self) -> str:
        """The text ended: what was held back is ordinary text."""
        held, self.held = self.held, ""
        return held

    def _first_completed(self, buffer: str, seen: int) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self.stops:
            # one that ends within `seen` was completed before, unarmed: it no longer counts
            start = buffer.find(stop, max(seen - len(stop) + 1, 0))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return best and (best[1], best[2])

    def _held_length(self, buffer: str) -> int:
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(buffer)), 0, -1):
            tail = buffer[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self.stops):
                return length
        return 0
