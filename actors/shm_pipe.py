"""A pipe over two rings of shared memory, one each way, beside the Unix socket that tells of death.

The eventfd counters are the cursors: a producer copies n bytes in and adds n to the data eventfd; the consumer learns
of them only by reading that eventfd, and gives room back through the other one. So no word of the shared memory is
read by both sides at once, the kernel orders the copies on every processor, and nobody spins. A memfd has no name:
whatever dies, nothing is left on disk or in /dev/shm.
"""

import fcntl
import mmap
import os
import select
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from .pipe import PeerGone, Piece

DEFAULT_RING_BYTES = 8 << 20
MIN_RING_BYTES, MAX_RING_BYTES = 4096, 1 << 30
ANNOUNCE_BYTES = 256 << 10  # a large message is told of in pieces, so that both sides copy at the same time
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # nobody can shrink it under our mapping


def check_ring_bytes(num_bytes: int) -> None:
    if not MIN_RING_BYTES <= num_bytes <= MAX_RING_BYTES:
        raise ValueError(f"a ring of {num_bytes} bytes: must be {MIN_RING_BYTES} to {MAX_RING_BYTES}")


class Ring:
    """One direction: the memory and its two eventfds, whose counters are bytes written and bytes given back."""

    def __init__(self, memory_fd: int, data_fd: int, room_fd: int) -> None:
        self.memory_fd, self.data_fd, self.room_fd = memory_fd, data_fd, room_fd
        self.num_bytes = os.fstat(memory_fd).st_size
        check_ring_bytes(self.num_bytes)
        if fcntl.fcntl(memory_fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError("the memory of a ring must be sealed against shrinking")
        # Populated now: on a virtual machine the first touch of a page costs tens of microseconds.
        self._map = mmap.mmap(memory_fd, self.num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.view = memoryview(self._map)

    @classmethod
    def create(cls, num_bytes: int) -> "Ring":
        check_ring_bytes(num_bytes)
        fds = [os.memfd_create("braid-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        try:
            os.ftruncate(fds[0], num_bytes)
            fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, SEALS)
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            return cls(*fds)
        except BaseException:  # out of fds or memory: what was opened so far must not stay open
            for fd in fds:
                os.close(fd)
            raise

    def fds(self) -> list[int]:
        return [self.memory_fd, self.data_fd, self.room_fd]

    def close(self) -> None:
        self.view.release()
        self._map.close()
        for fd in self.fds():
            os.close(fd)


class ShmPipe:
    transport: Literal["shm"] = "shm"

    def __init__(self, sock: socket.socket, outgoing: Ring, incoming: Ring) -> None:
        self._socket = sock
        self._out, self._in = outgoing, incoming
        self._write_at, self._room = 0, outgoing.num_bytes
        self._unannounced = 0  # written, not yet told to the peer
        self._read_at, self._available = 0, 0
        self._taken = 0  # read but not yet given back
        self._give_back_at = incoming.num_bytes // 4
        self._ending: str | None = None
        sock.setblocking(False)

    def interest(self, wants_room: bool) -> list[tuple[int, int]]:
        return [
            (self._in.data_fd, select.EPOLLIN),
            (self._socket.fileno(), select.EPOLLIN | select.EPOLLRDHUP),
            (self._out.room_fd, select.EPOLLIN if wants_room else 0),
        ]

    def ready(self, fd: int, mask: int) -> None:
        if fd == self._out.room_fd:
            return
        if fd != self._in.data_fd:
            self._ending = self._last_words()
        try:
            self._available += os.eventfd_read(self._in.data_fd)
        except BlockingIOError:
            return
        if self._available > self._in.num_bytes:
            self._available, self._ending = 0, "it announced more bytes than its ring holds"

    def _last_words(self) -> str:
        try:
            words = self._socket.recv(1)
        except OSError as error:
            return f"its socket failed: {error.strerror}"
        return "it spoke on the socket of a shared-memory link" if words else "its end of the link closed"

    def write(self, pieces: Sequence[Piece]) -> int:
        written = 0
        for piece in pieces:
            end = self._write_at + len(piece)
            if len(piece) <= self._room and len(piece) <= ANNOUNCE_BYTES and end < self._out.num_bytes:
                self._out.view[self._write_at : end] = piece
                self._write_at = end
                self._room -= len(piece)
                self._unannounced += len(piece)
                written += len(piece)
                continue
            part = self._write_parts(piece)
            written += part
            if part < len(piece):
                break
        self._announce()
        return written

    def _write_parts(self, piece: Piece) -> int:
        """For a piece that is large, meets the end of the ring or finds too little room."""
        done = 0
        while done < len(piece) and (self._room or self._collect_room()):
            part = min(len(piece) - done, self._room, ANNOUNCE_BYTES, self._out.num_bytes - self._write_at)
            end = self._write_at + part
            self._out.view[self._write_at : end] = piece[done : done + part]
            self._write_at = 0 if end == self._out.num_bytes else end
            self._room -= part
            done += part
            self._unannounced += part
            if self._unannounced >= ANNOUNCE_BYTES:
                self._announce()
        return done

    def _announce(self) -> None:
        if self._unannounced:
            os.eventfd_write(self._out.data_fd, self._unannounced)
            self._unannounced = 0

    def _collect_room(self) -> bool:
        try:
            self._room += os.eventfd_read(self._out.room_fd)
        except BlockingIOError:
            return False
        if self._room > self._out.num_bytes:
            raise PeerGone("it gave back more bytes than its ring holds")
        return True

    def window(self) -> tuple[memoryview, int, int]:
        if not self._available and self._ending is not None:
            raise PeerGone(self._ending)
        start = self._read_at
        return self._in.view, start, min(start + self._available, self._in.num_bytes)

    def consume(self, num_bytes: int) -> None:
        self._read_at += num_bytes
        if self._read_at == self._in.num_bytes:
            self._read_at = 0
        self._available -= num_bytes
        self._taken += num_bytes
        if self._taken >= self._give_back_at:
            os.eventfd_write(self._in.room_fd, self._taken)
            self._taken = 0

    def read_into(self, target: memoryview) -> int:
        view, start, end = self.window()
        num_bytes = min(len(target), end - start)
        target[:num_bytes] = view[start : start + num_bytes]
        self.consume(num_bytes)
        return num_bytes

    def socket_fd(self) -> int:
        return self._socket.fileno()

    def hang_up(self) -> None:
        with suppress(OSError):  # not connected any more: epoll has said so already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        self._out.close()
        self._in.close()
