"""Sockets of a listener: made, replaced when stale, refused when in use, removed; and its bound on handshakes."""

from __future__ import annotations

import errno
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from link_peer import SECRET, Address

from braid.actors.dialing import dial, host_id
from braid.actors.links import Hello, Link
from braid.actors.listener import MAX_HANDSHAKES, Listener
from braid.actors.reactor import Closed, Reactor

ME = Hello("me", "both", 1, host_id())
TIMEOUT_S = 20.0


def refuse_link(link: Link) -> None:
    raise RuntimeError(f"no room for {link.peer.name}")


def test_the_socket_file_is_private_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(ME, SECRET, str(path), None, Link.close)
    assert path.stat().st_mode & 0o777 == 0o600
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    script = (
        f"import os, socket; s = socket.socket(socket.AF_UNIX); s.bind({path!r}); s.listen(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert os.path.exists(path)
    Listener(ME, SECRET, path, None, Link.close).close()


def test_a_path_in_use_or_too_long_is_bad_input(tmp_path: Path) -> None:
    listener = Listener(ME, SECRET, str(tmp_path / "s"), None, Link.close)
    with pytest.raises(ValueError, match="is in use by a live process: choose another path"):
        Listener(ME, SECRET, str(tmp_path / "s"), None, Link.close)
    assert (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="at most 107 bytes, this has"):
        Listener(ME, SECRET, str(tmp_path / ("s" * 120)), None, Link.close)
    listener.close()


def test_a_tcp_port_in_use_leaves_nothing_open(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: .* choose another"):
            Listener(ME, SECRET, str(tmp_path / "s"), "127.0.0.1", Link.close, tcp_port=port)
    assert not (tmp_path / "s").exists()


def test_a_link_that_nobody_takes_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener(ME, SECRET, str(tmp_path / "s"), None, refuse_link)
    reactor = Reactor()
    reactor.add(dial(Address(str(tmp_path / "s"), "", 0), ME, SECRET, "unix", TIMEOUT_S))
    deadline, events = time.monotonic() + TIMEOUT_S, reactor.poll(TIMEOUT_S)
    while not any(isinstance(event, Closed) for event in events):
        assert time.monotonic() < deadline, "the link that nobody took was not closed"
        events = reactor.poll(TIMEOUT_S)
    assert "no room for me" in caplog.text
    listener.close()
    reactor.close()


def test_handshakes_under_way_are_bounded_and_end_with_the_listener(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    path = str(tmp_path / "s")
    listener = Listener(ME, SECRET, path, None, Link.close, handshake_timeout_s=2 * TIMEOUT_S)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(MAX_HANDSHAKES + 1)]
    for client in clients:
        client.settimeout(TIMEOUT_S)
        client.connect(path)
    assert clients[-1].recv(1) == b""
    assert f"{MAX_HANDSHAKES} handshakes under way" in caplog.text
    listener.close()
    for client in clients:
        client.close()
    assert not set(threading.enumerate()) - before


def test_clients_that_cannot_be_accepted_are_met_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of descriptors: whoever waits in line makes the socket readable again and again."""
    links: queue.Queue[Link] = queue.Queue()
    listener = Listener(ME, SECRET, str(tmp_path / "s"), None, links.put)
    accept, told = socket.socket.accept, queue.Queue[str]()

    def fail_twice(sock: socket.socket) -> tuple[socket.socket, object]:
        told.put("accept")
        if told.qsize() < 4:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", fail_twice)
    monkeypatch.setattr("braid.actors.listener.time.sleep", lambda seconds: told.put("pause"))
    dial(Address(str(tmp_path / "s"), "", 0), ME, SECRET, "unix", TIMEOUT_S).close()
    links.get(timeout=TIMEOUT_S).close()
    assert [told.get(timeout=TIMEOUT_S) for _ in range(5)] == ["accept", "pause", "accept", "pause", "accept"]
    assert caplog.text.count("Too many open files") == 2
    listener.close()


def test_a_listener_outlives_a_want_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links: queue.Queue[Link] = queue.Queue()
    listener = Listener(ME, SECRET, str(tmp_path / "s"), None, links.put)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as client:
        patch.setattr(threading.Thread, "start", fail)
        client.settimeout(TIMEOUT_S)
        client.connect(str(tmp_path / "s"))
        assert client.recv(1) == b""
    dial(Address(str(tmp_path / "s"), "", 0), ME, SECRET, "unix", TIMEOUT_S).close()
    links.get(timeout=TIMEOUT_S).close()
    listener.close()


def test_a_closed_listener_has_no_thread_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that has handed its link over and is about to end."""
    handshake, may_end = Listener._handshake, threading.Event()

    def end_late(listener: Listener, sock: socket.socket, address: str) -> None:
        handshake(listener, sock, address)
        may_end.wait(TIMEOUT_S)

    monkeypatch.setattr(Listener, "_handshake", end_late)
    links: queue.Queue[Link] = queue.Queue()
    listener = Listener(ME, SECRET, str(tmp_path / "s"), None, links.put)
    dial(Address(str(tmp_path / "s"), "", 0), ME, SECRET, "unix", TIMEOUT_S).close()
    links.get(timeout=TIMEOUT_S).close()
    closing = threading.Thread(target=listener.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    may_end.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
