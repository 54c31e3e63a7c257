"""Notices that a peer died while the thread that owns the link is busy computing."""

import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

from .links import Link

logger = logging.getLogger(__name__)


class DeathWatch:
    """One small thread for all links of a process: marks a dead link closed, so that sends fail at once.

    It owns second fds of the sockets, so no other thread can close one under it. The reactor needs no telling: its own
    epoll sees the same end, after the last message.
    """

    def __init__(self, on_death: Callable[[Link], None] | None = None) -> None:
        self._on_death = on_death
        self._epoll = select.epoll()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._stop_fd, select.EPOLLIN)
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()  # of `watch` and `close`, which come from different threads
        self._thread = threading.Thread(target=self._run, name="braid-death-watch", daemon=True)
        self._thread.start()

    def watch(self, link: Link) -> None:
        with self._lock:
            fd = None if self._epoll.closed else link.duplicate_socket()
            if fd is not None:
                self._links[fd] = link
                self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLHUP)

    def close(self) -> None:
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        with self._lock:
            for fd in self._links:
                os.close(fd)
            self._links.clear()
            self._epoll.close()
        os.close(self._stop_fd)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._stop_fd:
                    return
                self._bury(fd)

    def _bury(self, fd: int) -> None:
        link = self._links.pop(fd)
        with suppress(OSError):
            self._epoll.unregister(fd)
        os.close(fd)
        if link.is_closed_here:
            return
        link.mark_gone("its end of the link closed")
        if self._on_death is not None:
            try:
                self._on_death(link)
            except Exception:  # the watch must outlive its listener's mistakes
                logger.exception("on_death failed for %r", link)
