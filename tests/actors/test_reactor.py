"""What a reactor promises: each opening and closing told once and in order, nothing lost, nothing left behind."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
from leftovers import open_fds
from link_peer import ECHO, RING_BYTES, TIMEOUT_S, TRANSPORTS, LinkHost

from braid.actors.links import Link, LinkClosed, Message
from braid.actors.pipe import Piece
from braid.actors.reactor import MAX_MESSAGES_A_TURN, Closed, Opened, Reactor, Received

every_transport = pytest.mark.parametrize("transport", TRANSPORTS)
Transport = Literal["shm", "unix", "tcp"]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LinkHost]:
    made = LinkHost(tmp_path)
    yield made
    made.close()


@pytest.fixture
def far() -> Iterator[Reactor]:
    """The dialer's reactor."""
    made = Reactor()
    yield made
    made.close()


@every_transport
def test_each_end_knows_the_other(host: LinkHost, far: Reactor, transport: Transport) -> None:
    near, dialed = host.dial(transport, far)
    assert (near.peer.name, near.peer.role, near.peer.incarnation) == ("dialer", "both", 7)
    assert dialed.peer == host.hello
    assert near.transport == dialed.transport == transport


@every_transport
def test_a_link_is_told_opened_then_received_then_closed(host: LinkHost, far: Reactor, transport: Transport) -> None:
    near, dialed = host.dial(transport, far)
    for index in range(3 * MAX_MESSAGES_A_TURN):
        dialed.send(ECHO, b"%d" % index)
    host.until(lambda: far.poll(0) == [] and not dialed.queued_bytes, "room in a small socket's buffer")
    dialed.close("enough")
    host.until_closed(near)
    first, *middle, last = [event for event in host.events if event.link is near]
    assert isinstance(first, Opened)
    assert [event.message.meta for event in middle if isinstance(event, Received)] == [
        b"%d" % index for index in range(3 * MAX_MESSAGES_A_TURN)
    ]
    assert last == Closed(near, "dialer is gone: its end of the link closed")
    assert host.reactor.links() == []


@every_transport
def test_closing_ends_both_sides_and_is_told_once(host: LinkHost, far: Reactor, transport: Transport) -> None:
    near, dialed = host.dial(transport, far)
    near.close("no longer needed")
    near.close("again")
    with pytest.raises(LinkClosed, match="closed: no longer needed"):
        near.send(ECHO, b"")
    assert host.until_closed(near) == "no longer needed"
    events = far.poll(TIMEOUT_S)
    while not any(isinstance(event, Closed) for event in events):
        events = far.poll(TIMEOUT_S)
    assert dialed.closed == "host is gone: its end of the link closed"
    assert host.reactor.poll(0) == []
    assert not host.deaths


def test_a_sender_meets_a_reactor_that_is_just_letting_go_of_the_link(
    host: LinkHost, far: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills the ring and wants to be told of room while the reactor, on its thread, sees the other end close."""
    near, dialed = host.dial("shm", far)
    pipe, polling = near._pipe, threading.Thread(target=host.until_closed, args=(near,))
    write = pipe.write

    def write_while_it_ends(pieces: Sequence[Piece]) -> int:
        dialed.close("enough")
        polling.start()
        deadline = time.monotonic() + TIMEOUT_S
        while near in host.reactor.links():
            assert time.monotonic() < deadline
        polling.join(0.05)  # it waits for us now, and has done before whatever it would do without waiting
        written: int = write(pieces)
        return written

    monkeypatch.setattr(pipe, "write", write_while_it_ends)
    near.send(ECHO, b"", bytes(2 * RING_BYTES))
    polling.join(TIMEOUT_S)
    assert not polling.is_alive()
    assert host.closed(near)


def test_a_link_closed_before_it_was_added_is_still_told(host: LinkHost, far: Reactor) -> None:
    near, _ = host.dial("shm", far)
    near.close("early")
    host.until_closed(near)
    again = Reactor()
    again.add(near)
    assert again.poll(TIMEOUT_S) == [Opened(near), Closed(near, "early")]
    again.close()


def test_wake_ends_a_wait_from_another_thread() -> None:
    reactor = Reactor()
    thread = threading.Thread(target=reactor.wake)
    thread.start()
    start = time.monotonic()
    assert reactor.poll(TIMEOUT_S) == []
    assert time.monotonic() - start < TIMEOUT_S / 2
    thread.join()
    assert reactor.poll(0) == []
    reactor.close()


@every_transport
def test_many_threads_may_send(host: LinkHost, far: Reactor, transport: Transport) -> None:
    near, dialed = host.dial(transport, far)

    def send(name: int) -> None:
        for index in range(300):
            dialed.send(name, b"%d" % index, bytes([name]) * (index * 37 % 9000))

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()

    def is_done() -> bool:
        far.poll(0)
        return len(host.received(near)) == 4 * 300

    host.until(is_done, "all messages of four threads")
    for thread in threads:
        thread.join()
    for name in range(4):
        messages = [event.message for event in host.received(near) if event.message.kind == name]
        assert [message.meta for message in messages] == [b"%d" % index for index in range(300)]
        assert all(message.payload == bytes([name]) * (int(message.meta) * 37 % 9000) for message in messages)


@every_transport
def test_a_talkative_peer_does_not_starve_another(host: LinkHost, far: Reactor, transport: Transport) -> None:
    loud, loud_dialed = host.dial(transport, far)
    quiet, quiet_dialed = host.dial(transport, far)
    for _ in range(10 * MAX_MESSAGES_A_TURN):
        loud_dialed.send(ECHO, b"")
    quiet_dialed.send(ECHO, b"me too")
    host.until(lambda: bool(host.received(quiet)), "the quiet peer")
    assert len(host.received(loud)) <= 3 * MAX_MESSAGES_A_TURN

    def is_done() -> bool:
        far.poll(0)  # what a small socket's buffer had no room for
        return len(host.received(loud)) == 10 * MAX_MESSAGES_A_TURN

    host.until(is_done, "the talkative peer")


@every_transport
def test_a_peer_that_breaks_the_framing_is_cut_off(host: LinkHost, far: Reactor, transport: Transport) -> None:
    near, dialed = host.dial(transport, far)
    dialed._pipe.write([b"neither a header nor anything like one"])
    assert "not a frame of version 1" in host.until_closed(near)
    assert far.poll(TIMEOUT_S)


def test_a_peer_that_gives_back_room_it_never_had_is_cut_off(host: LinkHost, far: Reactor) -> None:
    near, dialed = host.dial("shm", far)
    ctypes.c_uint64.from_address(dialed._pipe._in.words + 64).value = 1 << 40  # where it tells how far it has read
    with pytest.raises(LinkClosed, match="gave back more bytes than its ring holds"):
        near.send(ECHO, b"", bytes(2 * RING_BYTES))
    assert "gave back more bytes" in host.until_closed(near)


@pytest.mark.parametrize("num_bytes", [0, 5, 100_000, 2 * RING_BYTES])
def test_a_reserved_message_keeps_its_place_in_the_order(host: LinkHost, far: Reactor, num_bytes: int) -> None:
    near, dialed = host.dial("shm", far)
    near.hold_payloads(7)
    payload = bytes(range(251)) * (num_bytes // 251 + 1)
    memory = dialed.reserve(4, num_bytes)
    assert (memory is None) == (num_bytes > RING_BYTES)
    if memory is not None:
        dialed.send(ECHO, b"second")
        memory[:] = payload[:num_bytes]
        dialed.commit(7, b"meta", num_bytes)
    else:
        dialed.send(7, b"meta", payload[:num_bytes])
        dialed.send(ECHO, b"second")

    def is_done() -> bool:
        far.poll(0)
        return len(host.received(near)) == 2

    host.until(is_done, "both messages")
    first, second = (event.message for event in host.received(near))
    assert (first.kind, first.meta, first.payload) == (7, b"meta", payload[:num_bytes])
    assert (first.hold is not None) == (num_bytes < RING_BYTES // 4)
    assert second.meta == b"second"
    host.events.clear()


def test_held_messages_that_are_dropped_free_the_ring(host: LinkHost, far: Reactor) -> None:
    near, dialed = host.dial("shm", far)
    near.hold_payloads(7)
    kept: list[Message] = []
    for index in range(40):
        dialed.send(7, b"%d" % index, bytes([index]) * (RING_BYTES // 5))
        host.until(lambda: far.poll(0) == [] and bool(host.received(near)), "a message")
        (event,) = host.received(near)
        host.events.clear()
        assert event.message.payload == bytes([index]) * (RING_BYTES // 5)
        kept = [*kept, event.message][-2:]
        assert [message.payload[0] for message in kept] == list(range(index + 1))[-2:]


def test_no_descriptor_and_no_thread_is_left(tmp_path: Path) -> None:
    before = open_fds(), set(threading.enumerate())
    host, far = LinkHost(tmp_path), Reactor()
    links: list[Link] = []
    for transport in TRANSPORTS:
        for _ in range(3):
            near, dialed = host.dial(transport, far)
            dialed.send(ECHO, b"", bytes(3_000_000))
            links += [near, dialed]
    links[0].close()
    host.until_closed(links[0])
    host.close()
    far.close()
    assert not open_fds() - before[0]
    assert not set(threading.enumerate()) - before[1]
    assert all(link.closed for link in links)
