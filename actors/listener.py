"""Accepts links on a Unix socket and on TCP, in threads of its own, so that a slow client delays nobody."""

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .handshake import Refused, check_secret, welcome
from .links import DEFAULT_MAX_QUEUED_BYTES, Hello, Link
from .shm_setup import receive_rings
from .socket_pipe import SocketPipe

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0  # what a worker that dials gives it: of two that are slow, none is cut off by the other
MAX_HANDSHAKES = 64  # under way at once; a further client is turned away, it may dial again
BACKLOG = 128
PAUSE_S = 0.1  # where nothing can be accepted: the client stays in line, and would be met again at once


class Listener:
    """Listens on a Unix path, on TCP, or both. `on_link` runs in handshake threads: Reactor.add is made for it."""

    def __init__(
        self,
        hello: Hello,
        secret: bytes,
        unix_path: str | None,
        tcp_host: str | None,
        on_link: Callable[[Link], None],
        max_queued_bytes: int = DEFAULT_MAX_QUEUED_BYTES,
        tcp_port: int = 0,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self._hello, self._secret, self._on_link = hello, check_secret(secret), on_link
        self._max_queued_bytes, self._handshake_timeout_s = max_queued_bytes, handshake_timeout_s
        self.unix_path = unix_path
        self.tcp_port = 0
        self._sockets: dict[int, socket.socket] = {}
        try:
            if unix_path is not None:
                self._add(bind_unix(unix_path))
            if tcp_host is not None:
                self.tcp_port = self._add(bind_tcp(tcp_host, tcp_port)).getsockname()[1]
        except BaseException:
            self._close_sockets()
            raise
        self._lock = threading.Lock()
        self._handshakes: dict[threading.Thread, socket.socket | None] = {}
        self._is_closed = False
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="braid-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accepts no more, ends the handshakes under way, removes the socket file. Links made before live on."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            handshakes = dict(self._handshakes)
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        for thread, sock in handshakes.items():
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join()
        self._close_sockets()
        os.close(self._stop_fd)

    def _add(self, sock: socket.socket) -> socket.socket:
        self._sockets[sock.fileno()] = sock
        return sock

    def _close_sockets(self) -> None:
        for sock in self._sockets.values():
            if sock.family == socket.AF_UNIX:
                Path(sock.getsockname()).unlink(missing_ok=True)
            sock.close()

    def _run(self) -> None:
        with select.epoll() as epoll:
            for fd in [*self._sockets, self._stop_fd]:
                epoll.register(fd, select.EPOLLIN)
            while True:
                for fd, _ in epoll.poll():
                    if fd == self._stop_fd:
                        return
                    self._accept(self._sockets[fd])

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, peer = listening.accept()
        except OSError as error:  # the client left again, or we are out of fds: neither may end the listener
            logger.warning("could not accept a link: %s", error)
            time.sleep(PAUSE_S)
            return
        address = f"{peer[0]}:{peer[1]}" if peer else str(self.unix_path)
        thread = threading.Thread(target=self._handshake, args=(sock, address), name="braid-handshake", daemon=True)
        with self._lock:
            self._handshakes = {other: its for other, its in self._handshakes.items() if other.is_alive()}
            if self._is_closed or len(self._handshakes) >= MAX_HANDSHAKES:
                logger.warning("turned away a link from %s: %d handshakes under way", address, len(self._handshakes))
                sock.close()
                return
            try:
                thread.start()
            except RuntimeError as error:  # out of threads: as above
                logger.warning("could not welcome a link from %s: %s", address, error)
                sock.close()
                return
            self._handshakes[thread] = sock

    def _handshake(self, sock: socket.socket, address: str) -> None:
        try:
            link = self._welcome(sock)
        except Refused as error:
            logger.warning("refused a link from %s: %s", address, error)
            sock.close()
        except Exception:  # one client's mishap must not go unlogged in a thread
            logger.exception("a link from %s failed", address)
            sock.close()
        else:
            self._hand_over(link)

    def _hand_over(self, link: Link) -> None:
        with self._lock:
            self._handshakes[threading.current_thread()] = None  # the link owns the socket now
            is_late = self._is_closed
        if is_late:
            link.close("the listener closed")
            return
        try:
            self._on_link(link)
        except Exception:
            logger.exception("nobody took %r", link)
            link.close("nobody took it")

    def _welcome(self, sock: socket.socket) -> Link:
        deadline = time.monotonic() + self._handshake_timeout_s
        theirs = welcome(sock, self._hello, self._secret, deadline)
        if theirs.transport == "shm":
            return Link(theirs.hello, receive_rings(sock, deadline), self._max_queued_bytes)
        return Link(theirs.hello, SocketPipe(sock, theirs.transport), self._max_queued_bytes)


def bind_unix(path: str) -> socket.socket:
    """Listens on a path; a file left by a process that died is replaced."""
    if len(os.fsencode(path)) > 107:
        raise ValueError(f"a Unix socket path has at most 107 bytes, this has {len(os.fsencode(path))}: {path}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    if not os.path.exists(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ValueError(f"{path} is in use by a live process: choose another path")


def bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another") from error
