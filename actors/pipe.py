"""What a link needs from the bytes underneath it: a non-blocking stream that an epoll can watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from ._native import Lane

Transport = Literal["shm", "unix", "tcp"]
Piece = bytes | memoryview


class PeerGone(Exception):
    """The other end is gone or broke the protocol, and everything it sent before has been read."""


class Pipe(Protocol):
    @property
    def transport(self) -> Transport: ...

    @property
    def lane(self) -> Lane | None:
        """Its rings for who reads and writes whole messages natively, if it has any."""
        ...

    def interest(self, wants_room: bool) -> list[tuple[int, int]]:
        """The (fd, epoll mask) pairs to watch; with `wants_room` also the one that tells of room to write."""
        ...

    def ready(self, fd: int, mask: int) -> None:
        """Takes note of what epoll said about one of the fds."""
        ...

    @property
    def incoming_words(self) -> int | None:
        """Where the words of the ring that it reads lie, if there is one."""
        ...

    def look(self) -> bool:
        """Whether bytes have arrived that can be seen without a system call."""
        ...

    def write(self, pieces: Sequence[Piece]) -> int:
        """Takes as many bytes as fit now, in order, without blocking. Raises PeerGone."""
        ...

    def window(self) -> tuple[memoryview, int, int]:
        """(buffer, start, end) of bytes that have arrived; none means nothing now. Raises PeerGone."""
        ...

    def consume(self, num_bytes: int) -> None:
        """Bytes of the window have been copied out."""
        ...

    def hold(self, num_bytes: int) -> object | None:
        """Like consume, but the bytes stay where they are as long as what is returned lives; None: it cannot be."""
        ...

    def reserve(self, head_bytes: int, payload_bytes: int) -> memoryview | None:
        """Where the payload of the next frame may be written; None: it cannot be.

        Until `commit` nothing is sent, and `write` takes nothing.
        """
        ...

    def commit(self, head: bytes, payload_bytes: int) -> None: ...

    def read_into(self, target: memoryview) -> int:
        """Copies what is there; 0 means nothing now. Raises PeerGone after the last byte."""
        ...

    def socket_fd(self) -> int:
        """The socket whose end of file means death."""
        ...

    def hang_up(self) -> None:
        """Lets both sides' epolls see the end at once; frees nothing. May be called twice."""
        ...

    def close(self) -> None: ...
