"""A pipe over two rings of shared memory, one each way, beside the Unix socket that tells of death.

Each end keeps its place in a word of its own, which the other reads without a system call (csrc/ring.hpp has the
argument why nothing is lost); an eventfd is written only when the other end sleeps. A ring that has been emptied is
written from its beginning again: question and answer move in the same few pages, which stay in the processor's cache.
A memfd has no name: whatever dies, nothing is left on disk or in /dev/shm. What is read, written and remembered is the
native `Lane`'s; an expert hop (csrc/hop.cpp) uses it without the pipe.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from .pipe import PeerGone, Piece

try:
    from . import _native
except ImportError:  # installed where there was no C++ compiler
    HAS_NATIVE = False
else:
    HAS_NATIVE = True

DEFAULT_RING_BYTES = 8 << 20
MIN_RING_BYTES, MAX_RING_BYTES = 4096, 1 << 30
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # nobody can shrink it under our mapping


def doze(rings: tuple[int, ...]) -> bool:
    """Asks the writers of these rings (the addresses of their words) for wake-ups; False when there is news already."""
    return _native.doze(rings)


def rouse(rings: tuple[int, ...]) -> None:
    """The reader is awake and looks at the words by itself."""
    _native.rouse(rings)


def check_ring_bytes(num_bytes: int) -> None:
    if not MIN_RING_BYTES <= num_bytes <= MAX_RING_BYTES:
        raise ValueError(f"a ring of {num_bytes} bytes: must be {MIN_RING_BYTES} to {MAX_RING_BYTES}")


class Ring:
    """One direction: a page of words, the bytes, and two eventfds that wake its reader and its writer."""

    def __init__(self, memory_fd: int, data_fd: int, room_fd: int) -> None:
        if not HAS_NATIVE:
            raise ValueError(
                "braid was installed without a C++ compiler, so it has no rings: install g++ and braid anew"
            )
        self.memory_fd, self.data_fd, self.room_fd = memory_fd, data_fd, room_fd
        self.num_bytes = os.fstat(memory_fd).st_size - _native.HEADER_BYTES
        check_ring_bytes(self.num_bytes)
        if fcntl.fcntl(memory_fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError("the memory of a ring must be sealed against shrinking")
        for fd in (data_fd, room_fd):  # another kind of file could hold up, or end, the thread that serves all links
            if os.get_blocking(fd) or os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
                raise ValueError("a ring is told of by eventfds that do not block")
        # Populated now: on a virtual machine the first touch of a page costs tens of microseconds.
        self.memory = mmap.mmap(memory_fd, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.words = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._whole = memoryview(self.memory)
        self.view = self._whole[_native.HEADER_BYTES :]

    @classmethod
    def create(cls, num_bytes: int) -> Ring:
        check_ring_bytes(num_bytes)
        fds = [os.memfd_create("braid-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        try:
            os.ftruncate(fds[0], num_bytes + _native.HEADER_BYTES)
            fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, SEALS)
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            made = cls(*fds)
        except BaseException:  # out of fds or memory: what was opened so far must not stay open
            for fd in fds:
                os.close(fd)
            raise
        _native.start(made.memory)
        return made

    def fds(self) -> list[int]:
        return [self.memory_fd, self.data_fd, self.room_fd]

    def close(self) -> None:
        self.view.release()
        self._whole.release()
        with suppress(BufferError):  # a payload in it is still being read: the memory goes with the last of them
            self.memory.close()
        for fd in self.fds():
            os.close(fd)


class ShmPipe:
    transport: Literal["shm"] = "shm"

    def __init__(self, sock: socket.socket, outgoing: Ring, incoming: Ring) -> None:
        self._socket = sock
        self._out, self._in = outgoing, incoming
        self.lane = _native.Lane(outgoing.memory, outgoing.data_fd, incoming.memory, incoming.room_fd)
        self._ending: str | None = None
        self.incoming_words = incoming.words
        sock.setblocking(False)

    def interest(self, wants_room: bool) -> list[tuple[int, int]]:
        if self.lane.watch_room(wants_room):
            os.eventfd_write(self._out.room_fd, 1)  # it came before we asked to be told: tell ourselves
        return [
            (self._in.data_fd, select.EPOLLIN),
            (self._socket.fileno(), select.EPOLLIN | select.EPOLLRDHUP),
            (self._out.room_fd, select.EPOLLIN if wants_room else 0),
        ]

    def ready(self, fd: int, mask: int) -> None:
        if fd == self._socket.fileno():
            self._ending = self._last_words()
        else:
            with suppress(BlockingIOError):
                os.eventfd_read(fd)
        self.look()

    def look(self) -> bool:
        try:
            return self.lane.look()
        except PeerGone as error:
            self._ending = str(error)
            return True

    def _last_words(self) -> str:
        try:
            words = self._socket.recv(1)
        except OSError as error:
            return f"its socket failed: {error.strerror}"
        return "it spoke on the socket of a shared-memory link" if words else "its end of the link closed"

    def write(self, pieces: Sequence[Piece]) -> int:
        return self.lane.write(pieces)

    def window(self) -> tuple[memoryview, int, int]:
        start, end = self.lane.window()
        if start == end and self._ending is not None:
            raise PeerGone(self._ending)
        self.lane.is_cut = False
        return self._in.view, start, end

    def consume(self, num_bytes: int) -> None:
        self.lane.consume(num_bytes)

    def hold(self, num_bytes: int) -> object | None:
        """Like consume, but the bytes stay there until what is returned is dropped. None: they are too many."""
        return self.lane.hold(num_bytes)

    def reserve(self, head_bytes: int, payload_bytes: int) -> memoryview | None:
        """Where the payload of the next frame may be written at once, if its place is free and in one piece."""
        start = self.lane.reserve(head_bytes, payload_bytes)
        return None if start is None else self._out.view[start : start + payload_bytes]

    def commit(self, head: bytes, payload_bytes: int) -> None:
        """Sends what was reserved last, with its head."""
        self.lane.commit(head, payload_bytes)

    def read_into(self, target: memoryview) -> int:
        """Asked for the rest of a frame that has not come as a whole."""
        view, start, end = self.window()
        num_bytes = min(len(target), end - start)
        if num_bytes:
            target[:num_bytes] = view[start : start + num_bytes]
            self.consume(num_bytes)
        self.lane.is_cut = True
        return num_bytes

    def socket_fd(self) -> int:
        return self._socket.fileno()

    def hang_up(self) -> None:
        self.lane.is_hung = True
        with suppress(OSError):  # not connected any more: epoll has said so already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.lane.close()
        self._socket.close()
        self._out.close()
        self._in.close()
