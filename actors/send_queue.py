"""What a pipe had no room for yet, in order, as copies: after `send` the caller may reuse its buffers."""

from collections import deque
from collections.abc import Sequence

from .pipe import Piece, Pipe


class SendQueue:
    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self.num_bytes = 0

    def __bool__(self) -> bool:
        return self.num_bytes > 0

    def put(self, pieces: Sequence[Piece], written: int) -> None:
        """Keeps the pieces but for their first `written` bytes."""
        for piece in pieces:
            if written < len(piece):
                self._pieces.append(bytes(piece[written:]))
                self.num_bytes += len(piece) - written
            written = max(0, written - len(piece))

    def drain(self, pipe: Pipe) -> bool:
        """Writes as long as there is room; True when nothing is left. Raises PeerGone."""
        while self._pieces:
            written = pipe.write(self._pieces)
            if not written:
                return False
            self.num_bytes -= written
            while written:
                piece = self._pieces.popleft()
                if written < len(piece):
                    self._pieces.appendleft(memoryview(piece)[written:])
                written = max(0, written - len(piece))
        return True

    def clear(self) -> None:
        self._pieces.clear()
        self.num_bytes = 0
