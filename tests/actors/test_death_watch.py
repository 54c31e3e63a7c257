"""A watch that ends while another thread has it watch one more link."""

from __future__ import annotations

import socket
import threading

import pytest

from braid.actors.death_watch import DeathWatch
from braid.actors.links import Hello, Link
from braid.actors.socket_pipe import SocketPipe


def test_a_link_that_comes_while_the_watch_closes_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    link, watch = Link(Hello("peer", "both", 1, "host"), SocketPipe(ours, "unix")), DeathWatch()
    duplicate, closing = link.duplicate_socket, threading.Thread(target=watch.close)

    def duplicate_while_it_closes() -> int | None:
        fd = duplicate()
        closing.start()
        closing.join(0.1)  # it waits for us now, and would have closed everything before without waiting
        return fd

    monkeypatch.setattr(link, "duplicate_socket", duplicate_while_it_closes)
    watch.watch(link)
    closing.join()
    link.close()
    assert theirs.recv(1) == b""
    theirs.close()
    watch.watch(link)  # of a closed watch: nothing to do
