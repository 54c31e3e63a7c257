"""A pipe over two rings of shared memory, one each way, beside the Unix socket that tells of death.

Each end keeps its place in a word of its own, which the other reads without a system call (csrc/ring.cpp has the
argument why nothing is lost); an eventfd is written only when the other end sleeps. A ring that has been emptied is
written from its beginning again: question and answer move in the same few pages, which stay in the processor's cache.
A memfd has no name: whatever dies, nothing is left on disk or in /dev/shm.
"""

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
ANNOUNCE_BYTES = 256 << 10  # a large message is told of in pieces, so that both sides copy at the same time
MAX_HELD_SHARE = 4  # a larger part of a ring is not kept waiting for its reader
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
        # Populated now: on a virtual machine the first touch of a page costs tens of microseconds.
        self._map = mmap.mmap(memory_fd, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.words = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._whole = memoryview(self._map)
        self.view = self._whole[_native.HEADER_BYTES :]

    @classmethod
    def create(cls, num_bytes: int) -> "Ring":
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
        _native.start(made.words)
        return made

    def fds(self) -> list[int]:
        return [self.memory_fd, self.data_fd, self.room_fd]

    def close(self) -> None:
        self.view.release()
        self._whole.release()
        with suppress(BufferError):  # a payload in it is still being read: the memory goes with the last of them
            self._map.close()
        for fd in self.fds():
            os.close(fd)


class Hold:
    """Keeps bytes of a ring from being written over for as long as it lives."""

    def __init__(self, pipe: "ShmPipe", start: int) -> None:
        self._pipe, self._start = pipe, start

    def __del__(self) -> None:
        self._pipe.let_go(self._start)


class ShmPipe:
    transport: Literal["shm"] = "shm"

    def __init__(self, sock: socket.socket, outgoing: Ring, incoming: Ring) -> None:
        self._socket = sock
        self._out, self._in = outgoing, incoming
        # Bytes since the ring was made; byte n lies at (n - origin) % size.
        self._written = self._announced = self._freed = self._write_origin = 0
        self._read = self._arrived = self._read_origin = 0
        self._held: dict[int, None] = {}  # where it begins what was read and is still needed; in order
        self._is_closed = False
        self._ending: str | None = None
        self.incoming_words = incoming.words
        sock.setblocking(False)

    def interest(self, wants_room: bool) -> list[tuple[int, int]]:
        if _native.watch_room(self._out.words, wants_room, self._out.num_bytes):
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
        arrived = _native.written(self._in.words)
        if arrived == self._arrived:
            return self._arrived != self._read
        if arrived - self._read > self._in.num_bytes or arrived < self._arrived:
            self._arrived, self._ending = self._read, "it announced more bytes than its ring holds"
            return True
        if self._read == self._arrived:  # the origin moves only when all before it has been read
            self._read_origin = _native.origin(self._in.words)
        self._arrived = arrived
        return True

    def _last_words(self) -> str:
        try:
            words = self._socket.recv(1)
        except OSError as error:
            return f"its socket failed: {error.strerror}"
        return "it spoke on the socket of a shared-memory link" if words else "its end of the link closed"

    def write(self, pieces: Sequence[Piece]) -> int:
        self._collect_room()
        written = 0
        for piece in pieces:
            num_bytes, ring = len(piece), self._out
            start = (self._written - self._write_origin) % ring.num_bytes
            room = ring.num_bytes - (self._written - self._freed)
            if num_bytes <= room and num_bytes <= ANNOUNCE_BYTES and start + num_bytes <= ring.num_bytes:
                ring.view[start : start + num_bytes] = piece
                self._written += num_bytes
                written += num_bytes
                continue
            part = self._write_parts(piece)
            written += part
            if part < num_bytes:
                break
        self._announce()
        return written

    def _write_parts(self, piece: Piece) -> int:
        """For a piece that is large, meets the end of the ring or finds too little room."""
        done, size = 0, self._out.num_bytes
        while done < len(piece):
            room = size - (self._written - self._freed)
            if not room:
                self._announce()
                self._collect_room()
                if not (room := size - (self._written - self._freed)):
                    break
            start = (self._written - self._write_origin) % size
            part = min(len(piece) - done, room, ANNOUNCE_BYTES, size - start)
            self._out.view[start : start + part] = piece[done : done + part]
            self._written += part
            done += part
            if self._written - self._announced >= ANNOUNCE_BYTES:
                self._announce()
        return done

    def _announce(self) -> None:
        if self._written != self._announced:
            self._announced = self._written
            if _native.announce(self._out.words, self._written, self._write_origin):
                os.eventfd_write(self._out.data_fd, 1)

    def _collect_room(self) -> None:
        """What has been read since; with everything announced only, for it may move the origin."""
        freed = _native.read(self._out.words)
        if not self._freed <= freed <= self._announced:
            raise PeerGone("it gave back more bytes than its ring holds")
        self._freed = freed
        if freed == self._written:
            self._write_origin = freed

    def window(self) -> tuple[memoryview, int, int]:
        available = self._arrived - self._read
        if not available and self._ending is not None:
            raise PeerGone(self._ending)
        start = (self._read - self._read_origin) % self._in.num_bytes
        return self._in.view, start, min(start + available, self._in.num_bytes)

    def consume(self, num_bytes: int) -> None:
        self._read += num_bytes
        _native.see(self._in.words, self._read)
        if not self._held:
            self._give_back()

    def hold(self, num_bytes: int) -> Hold | None:
        """Like consume, but the bytes stay where they are until the Hold is dropped. None where they are too many."""
        if num_bytes > self._in.num_bytes // MAX_HELD_SHARE:
            return None
        start = self._read
        self._held[start] = None
        self.consume(num_bytes)
        return Hold(self, start)

    def let_go(self, start: int) -> None:
        del self._held[start]
        if not self._is_closed:
            self._give_back()

    def _give_back(self) -> None:
        free = next(iter(self._held), self._read)
        if _native.give_back(self._in.words, free, self._in.num_bytes):
            os.eventfd_write(self._in.room_fd, 1)

    def reserve(self, head_bytes: int, payload_bytes: int) -> memoryview | None:
        """Where the payload of the next frame may be written at once, if its place is free and in one piece."""
        self._collect_room()
        start = (self._written - self._write_origin) % self._out.num_bytes
        end = start + head_bytes + payload_bytes
        room = self._out.num_bytes - (self._written - self._freed)
        if end > self._out.num_bytes or head_bytes + payload_bytes > room:
            return None
        return self._out.view[start + head_bytes : end]

    def commit(self, head: bytes, payload_bytes: int) -> None:
        """Sends what was reserved last, with its head; nothing may be written between the two."""
        start = (self._written - self._write_origin) % self._out.num_bytes
        self._out.view[start : start + len(head)] = head
        self._written += len(head) + payload_bytes
        self._announce()

    def read_into(self, target: memoryview) -> int:
        view, start, end = self.window()
        num_bytes = min(len(target), end - start)
        if num_bytes:
            target[:num_bytes] = view[start : start + num_bytes]
            self.consume(num_bytes)
        return num_bytes

    def socket_fd(self) -> int:
        return self._socket.fileno()

    def hang_up(self) -> None:
        with suppress(OSError):  # not connected any more: epoll has said so already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._is_closed = True
        self._socket.close()
        self._out.close()
        self._in.close()
