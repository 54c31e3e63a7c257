"""Links: the message connections between two worker processes, and all that can go wrong with them.

LinkError
├── LinkClosed          the peer is gone: send the same thing to somebody else
├── LinkFull            the peer reads too slowly: back off, or refuse the work
├── DialFailed          nobody answered at that address: try again until your own deadline
└── HandshakeRejected   somebody answered and we are not of one cluster: do not try again with this view
"""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .framing import HEADER, FrameReader, frame_head, frame_pieces
from .pipe import PeerGone, Piece, Pipe, Transport
from .send_queue import SendQueue

if TYPE_CHECKING:
    from ._native import Lane

DEFAULT_MAX_QUEUED_BYTES = 256 << 20


class LinkError(Exception): ...


class LinkClosed(LinkError): ...


class LinkFull(LinkError): ...


class DialFailed(LinkError): ...


class HandshakeRejected(LinkError):
    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"no link with {address}: {reason}")
        self.address, self.reason = address, reason


@dataclass(frozen=True, slots=True)
class Hello:
    """Who stands at one end of a link; proved by the handshake together with the cluster's secret."""

    name: str
    role: str
    incarnation: int
    host_id: str


@dataclass(slots=True)  # not frozen: that would triple what it costs to make one, and there is one per message
class Message:
    kind: int
    meta: bytes
    payload: memoryview
    hold: object = None  # keeps the payload's memory where it is the link's


class Link:
    """One connection to one life of one peer. Any thread may send and close; the reactor's thread does the rest.

    What `send` could not write at once waits here, bounded, as a copy: the caller may reuse its buffers.
    """

    def __init__(self, peer: Hello, pipe: Pipe, max_queued_bytes: int = DEFAULT_MAX_QUEUED_BYTES) -> None:
        self.peer = peer
        self.max_queued_bytes = max_queued_bytes
        self.closed: str | None = None
        self.bytes_sent = self.bytes_received = 0
        self.messages_sent = self.messages_received = 0
        self.last_received = time.monotonic()
        self._pipe = pipe
        self._reader = FrameReader()
        self._lock = threading.RLock()  # guards all below, and the writing half of the pipe
        self._queue = SendQueue()
        self._epoll: select.epoll | None = None
        self.is_closed_here = self._is_attached = self._is_released = False

    def __repr__(self) -> str:
        return f"Link({self.peer.name}/{self.peer.incarnation} over {self.transport}, closed={self.closed!r})"

    @property
    def transport(self) -> Transport:
        return self._pipe.transport

    @property
    def queued_bytes(self) -> int:
        return self._queue.num_bytes

    def send(self, kind: int, meta: bytes, *payload: Piece) -> None:
        """Writes or queues one message, never blocks. All or nothing: after LinkFull nothing of it was sent."""
        pieces, num_bytes = frame_pieces(kind, meta, payload)
        if num_bytes > self.max_queued_bytes:
            raise ValueError(f"{num_bytes} bytes never fit max_queued_bytes {self.max_queued_bytes}: send less at once")
        with self._lock:
            if self.closed is not None:
                raise LinkClosed(f"the link to {self.peer.name} is closed: {self.closed}")
            if self._queue.num_bytes + num_bytes > self.max_queued_bytes:
                raise LinkFull(f"{self.peer.name} reads too slowly: {self._queue.num_bytes} bytes wait for it")
            try:
                written = 0 if self._queue else self._pipe.write(pieces)
            except PeerGone as error:
                self._give_up(error)
                raise LinkClosed(f"the link to {self.peer.name} is closed: {self.closed}") from error
            if written < num_bytes:
                self._queue.put(pieces, written)
                self._watch_room(True)
            self.bytes_sent += num_bytes
            self.messages_sent += 1

    def reserve(self, meta_bytes: int, payload_bytes: int) -> memoryview | None:
        """Memory for the payload of the next message, where it need not be copied; None: `send` it as always.

        Everybody else's messages queue behind it until `commit`, which must follow.
        """
        with self._lock:
            if self.closed is not None or self._queue:
                return None
            try:
                return self._pipe.reserve(HEADER.size + meta_bytes, payload_bytes)
            except PeerGone as error:
                self._give_up(error)
                return None

    def commit(self, kind: int, meta: bytes, payload_bytes: int) -> None:
        """Sends what was reserved; both lengths must be those that were told then."""
        with self._lock:
            if self.closed is not None:
                raise LinkClosed(f"the link to {self.peer.name} is closed: {self.closed}")
            self._pipe.commit(frame_head(kind, meta, payload_bytes), payload_bytes)
            self.bytes_sent += HEADER.size + len(meta) + payload_bytes
            self.messages_sent += 1
            if self._queue:
                self.flush()

    def hold_payloads(self, kind: int) -> None:
        """Messages of this kind may leave their payload in the link's memory, which is free again when they are."""
        self._reader.held_kind = kind

    def close(self, reason: str = "closed by its owner") -> None:
        """Ends the link; what is still queued is dropped. In a reactor, a Closed event follows."""
        with self._lock:
            self.is_closed_here = True
            if self.closed is None:
                self.closed = reason
            if self._is_released:
                return
            self._pipe.hang_up()  # wakes the peer, our reactor and our DeathWatch
            if not self._is_attached:
                self.release()

    # For the reactor and the death watch only, from here on.

    def attach(self) -> None:
        """From now on a reactor releases the link, not close()."""
        with self._lock:
            self._is_attached = True

    def register(self, epoll: select.epoll) -> list[int]:
        """Joins the epoll; returns the fds, none if the link was released before."""
        with self._lock:
            if self._is_released:
                return []
            self._epoll = epoll
            interest = self._pipe.interest(bool(self._queue))
            for fd, mask in interest:
                epoll.register(fd, mask)
            return [fd for fd, _ in interest]

    def unregister(self, fds: list[int]) -> None:
        """Leaves the epoll, before anybody who sends could wait for room in it again."""
        with self._lock:
            epoll, self._epoll = self._epoll, None
            if epoll is None:
                return
            for fd in fds:
                with suppress(OSError):
                    epoll.unregister(fd)

    def ready(self, fd: int, mask: int) -> None:
        self._pipe.ready(fd, mask)
        if self._queue:
            self.flush()

    @property
    def lane(self) -> Lane | None:
        """Its rings, for who moves whole messages past the link and tells it by `has_sent` and `has_taken`."""
        return self._pipe.lane

    def has_sent(self, num_bytes: int) -> None:
        self.bytes_sent += num_bytes
        self.messages_sent += 1
        if self._queue:
            self.flush()

    def has_taken(self, num_bytes: int) -> None:
        self.bytes_received += num_bytes
        self.messages_received += 1
        self.last_received = time.monotonic()

    def incoming_words(self) -> int | None:
        return self._pipe.incoming_words

    def look(self) -> bool:
        return self._pipe.look()

    def receive(self) -> Message | None:
        """The next whole message that has arrived. Raises PeerGone after the last one."""
        if self.is_closed_here:
            raise PeerGone(self.closed)
        try:
            frame = self._reader.read(self._pipe)
        except PeerGone as error:
            middle = " in the middle of a message" if self._reader.is_mid_frame() else ""
            self.mark_gone(f"{error}{middle}")
            raise
        if frame is None:
            return None
        message = Message(*frame)
        self.bytes_received += len(message.meta) + len(message.payload)
        self.messages_received += 1
        self.last_received = time.monotonic()
        return message

    def flush(self) -> None:
        """Writes what is queued as far as there is room."""
        with self._lock:
            if self.closed is None:
                try:
                    if self._queue.drain(self._pipe):
                        self._watch_room(False)
                except PeerGone as error:
                    self._give_up(error)

    def mark_gone(self, reason: str) -> None:
        """Death was seen: nothing more can be sent; what has arrived can still be received."""
        if self.closed is None:
            self.closed = f"{self.peer.name} is gone: {reason}"

    def duplicate_socket(self) -> int | None:
        """A second fd of the socket, for a DeathWatch to own; None when the link is already over."""
        with self._lock:
            return None if self._is_released else os.dup(self._pipe.socket_fd())

    def release(self) -> None:
        with self._lock:
            if not self._is_released:
                self._is_released = True
                self._queue.clear()
                self._epoll = None
                self._pipe.hang_up()  # a DeathWatch has a second fd: closing ours alone would not end it
                self._pipe.close()

    def _give_up(self, error: PeerGone) -> None:
        """Writing failed. The reactor tells of it when it meets the end, after the last message."""
        self.mark_gone(str(error))
        self._pipe.hang_up()

    def _watch_room(self, wants_room: bool) -> None:
        if self._epoll is not None:
            for fd, mask in self._pipe.interest(wants_room):
                self._epoll.modify(fd, mask)
