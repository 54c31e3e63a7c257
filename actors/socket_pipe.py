"""A pipe over one connected stream socket, Unix or TCP."""

import select
import socket
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Literal

from .pipe import PeerGone, Piece

STAGING_BYTES = 16 * 1024
MAX_PIECES = 512  # the kernel takes at most 1,024 in one sendmsg
BUFFER_BYTES = 1 << 20
WATCHED = select.EPOLLIN | select.EPOLLRDHUP
KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
USER_TIMEOUT_MS = 20_000  # also ends the link to a peer that is alive and has had no room for our bytes this long


class SocketPipe:
    """Small reads go through a staging buffer (one recv for many frames), large ones straight to their target."""

    def __init__(self, sock: socket.socket, transport: Literal["unix", "tcp"]) -> None:
        self.transport: Literal["unix", "tcp"] = transport
        self._socket = sock
        self._staging = memoryview(bytearray(STAGING_BYTES))
        self._start = self._end = 0
        # A read that came back short emptied the socket: no second call just to be told so. Epoll speaks up again.
        self._is_drained = True
        sock.setblocking(False)
        if transport == "tcp":
            tune_tcp(sock)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def interest(self, wants_room: bool) -> list[tuple[int, int]]:
        return [(self._socket.fileno(), WATCHED | select.EPOLLOUT if wants_room else WATCHED)]

    def ready(self, fd: int, mask: int) -> None:
        if mask & ~select.EPOLLOUT:
            self._is_drained = False

    incoming_words = None
    lane = None

    def look(self) -> bool:
        return False

    def write(self, pieces: Sequence[Piece]) -> int:
        try:
            return self._socket.sendmsg(pieces if len(pieces) <= MAX_PIECES else list(islice(pieces, MAX_PIECES)))
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerGone(f"its socket failed: {error.strerror}") from error

    def window(self) -> tuple[memoryview, int, int]:
        if self._start == self._end:
            self._start, self._end = 0, self._receive(self._staging)
        return self._staging, self._start, self._end

    def consume(self, num_bytes: int) -> None:
        self._start += num_bytes

    def hold(self, num_bytes: int) -> None:
        return None

    def reserve(self, head_bytes: int, payload_bytes: int) -> None:
        return None

    def commit(self, head: bytes, payload_bytes: int) -> None:
        raise AssertionError("nothing can be reserved on a socket")

    def read_into(self, target: memoryview) -> int:
        if self._start == self._end and len(target) >= STAGING_BYTES:
            return self._receive(target)
        staging, start, end = self.window()
        num_bytes = min(len(target), end - start)
        target[:num_bytes] = staging[start : start + num_bytes]
        self._start += num_bytes
        return num_bytes

    def _receive(self, target: memoryview) -> int:
        if self._is_drained:
            return 0
        try:
            num_bytes = self._socket.recv_into(target)
        except BlockingIOError:
            self._is_drained = True
            return 0
        except OSError as error:
            raise PeerGone(f"its socket failed: {error.strerror}") from error
        if not num_bytes:
            raise PeerGone("its end of the link closed")
        self._is_drained = num_bytes < len(target)
        return num_bytes

    def socket_fd(self) -> int:
        return self._socket.fileno()

    def hang_up(self) -> None:
        with suppress(OSError):  # not connected any more: epoll has said so already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def tune_tcp(sock: socket.socket) -> None:
    """Small messages leave at once; a host that vanished without a word is noticed in 20 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
