"""The shared-memory ring: a stream larger than the ring, the end of the peer, and a peer that breaks the rules."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leftovers import open_fds

from braid.actors._native import HEADER_BYTES
from braid.actors.handshake import Refused
from braid.actors.pipe import PeerGone
from braid.actors.shm_pipe import MIN_RING_BYTES, SEALS, Ring, doze, rouse
from braid.actors.shm_setup import receive_rings, send_rings

WRITTEN, READ = 0, 64  # where csrc/ring.hpp has these words


def set_word(ring: Ring, word: int, value: int) -> None:
    """As a peer could that breaks the rules."""
    ctypes.c_uint64.from_address(ring.words + word).value = value


class Pair:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.writer = send_rings(ours, MIN_RING_BYTES)
        self.reader = receive_rings(theirs, deadline=time.monotonic() + 5)

    def data_arrived(self) -> bool:
        """What epoll would say of the reader's data eventfd."""
        fd = self.reader._in.data_fd
        with select.epoll() as epoll:
            epoll.register(fd, select.EPOLLIN)
            events = epoll.poll(0)
        for event_fd, mask in events:
            self.reader.ready(event_fd, mask)
        return bool(events)

    def read(self, num_bytes: int) -> bytes:
        target = bytearray(num_bytes)
        return bytes(target[: self.reader.read_into(memoryview(target))])

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@given(
    pieces=st.lists(st.binary(max_size=3 * MIN_RING_BYTES), max_size=8), read_bytes=st.integers(1, 2 * MIN_RING_BYTES)
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_stream_passes_through_a_smaller_ring(pieces: list[bytes], read_bytes: int) -> None:
    pair = Pair()
    stream = b"".join(pieces)
    sent, got = 0, b""
    while len(got) < len(stream):
        sent += pair.writer.write([stream[sent:]]) if sent < len(stream) else 0
        pair.data_arrived()
        part = pair.read(read_bytes)
        assert part or sent < len(stream)
        got += part
    assert got == stream
    pair.close()


def test_nothing_is_read_before_it_is_announced(pair: Pair) -> None:
    assert pair.writer.write([b"hello"]) == 5
    assert pair.read(10) == b""
    assert pair.data_arrived()
    assert pair.read(10) == b"hello"
    assert not pair.data_arrived()


def test_a_reader_that_is_awake_is_not_woken(pair: Pair) -> None:
    rouse((pair.reader.incoming_words,))
    assert not pair.reader.look()
    pair.writer.write([b"hello"])
    assert not pair.data_arrived()
    assert pair.reader.look()
    assert pair.read(10) == b"hello"
    assert doze((pair.reader.incoming_words,))
    pair.writer.write([b"wake up"])
    assert pair.data_arrived()
    assert pair.read(10) == b"wake up"


def test_who_wants_to_sleep_is_told_of_what_has_just_come(pair: Pair) -> None:
    rouse((pair.reader.incoming_words,))
    pair.writer.write([b"hello"])
    assert not doze((pair.reader.incoming_words,))


def test_an_emptied_ring_is_written_from_its_beginning_again(pair: Pair) -> None:
    for number in range(5):
        pair.writer.write([b"message %d" % number])
        assert pair.reader.look()
        assert pair.reader.window()[1:] == (0, 9)
        assert pair.read(100) == b"message %d" % number


def test_room_that_came_before_it_was_asked_for_is_told(pair: Pair) -> None:
    pair.writer.write([bytes(MIN_RING_BYTES)])
    assert pair.data_arrived()
    pair.read(MIN_RING_BYTES)
    room_fd = pair.writer._out.room_fd
    with select.epoll() as epoll:
        epoll.register(room_fd, dict(pair.writer.interest(wants_room=True))[room_fd])
        assert epoll.poll(0)


def test_held_bytes_stay_and_free_their_room_in_any_order(pair: Pair) -> None:
    """Four parts of an eighth each are held; what is written meanwhile never touches them."""
    part = MIN_RING_BYTES // 8
    for mark in b"abcd":
        pair.writer.write([bytes([mark]) * part])
    pair.data_arrived()
    holds, views = [], []
    for _ in range(4):
        view, start, _ = pair.reader.window()
        views.append(view[start : start + part])
        holds.append(pair.reader.hold(part))
    assert all(holds)
    assert pair.writer.write([b"e" * MIN_RING_BYTES]) == 4 * part
    assert [bytes(view[:1]) for view in views] == [b"a", b"b", b"c", b"d"]
    holds[1] = None
    assert pair.writer.write([b"f"]) == 0
    holds[0] = None
    assert pair.writer.write([b"f" * MIN_RING_BYTES]) == 2 * part
    assert [bytes(view[:1]) for view in views[2:]] == [b"c", b"d"]
    holds.clear()
    pair.data_arrived()
    assert pair.read(4 * part) == b"e" * 4 * part
    for view in views:
        view.release()


def test_too_much_is_not_held(pair: Pair) -> None:
    pair.writer.write([bytes(MIN_RING_BYTES)])
    pair.data_arrived()
    assert pair.reader.hold(MIN_RING_BYTES // 2) is None


def test_a_hold_may_outlive_its_pipe() -> None:
    pair = Pair()
    pair.writer.write([b"hello"])
    pair.data_arrived()
    view, start, end = pair.reader.window()
    kept, hold = view[start:end], pair.reader.hold(5)
    pair.close()
    assert bytes(kept) == b"hello"
    del hold
    kept.release()


def test_what_is_reserved_is_sent_by_commit_and_not_before(pair: Pair) -> None:
    memory = pair.writer.reserve(4, 5)
    assert memory is not None
    memory[:] = b"hello"
    assert not pair.data_arrived()
    pair.writer.commit(b"head", 5)
    assert pair.data_arrived()
    assert pair.read(100) == b"headhello"
    assert pair.writer.reserve(4, MIN_RING_BYTES) is None


def test_a_full_ring_takes_no_more_until_room_is_given_back(pair: Pair) -> None:
    assert pair.writer.write([bytes(MIN_RING_BYTES + 1)]) == MIN_RING_BYTES
    assert pair.writer.write([b"x"]) == 0
    room_fd = pair.writer._out.room_fd
    with select.epoll() as epoll:
        epoll.register(room_fd, dict(pair.writer.interest(wants_room=True))[room_fd])
        assert not epoll.poll(0)
        pair.data_arrived()
        pair.read(MIN_RING_BYTES // 2)
        assert epoll.poll(0)
    assert pair.writer.write([b"x"]) == 1


def test_what_was_written_before_the_end_is_read_first(pair: Pair) -> None:
    pair.writer.write([b"last words"])
    pair.writer.hang_up()
    pair.reader.ready(pair.reader.socket_fd(), select.EPOLLRDHUP)
    assert pair.read(100) == b"last words"
    with pytest.raises(PeerGone, match="its end of the link closed"):
        pair.read(100)


def test_a_peer_that_announces_or_gives_back_too_much_is_cut_off(pair: Pair) -> None:
    set_word(pair.reader._in, WRITTEN, MIN_RING_BYTES + 1)
    os.eventfd_write(pair.reader._in.data_fd, 1)
    assert pair.data_arrived()
    with pytest.raises(PeerGone, match="announced more bytes than its ring holds"):
        pair.read(1)
    pair.writer.write([bytes(MIN_RING_BYTES)])
    set_word(pair.writer._out, READ, MIN_RING_BYTES + 1)
    with pytest.raises(PeerGone, match="gave back more bytes than its ring holds"):
        pair.writer.write([b"x"])


def test_a_word_on_the_socket_beside_the_rings_ends_the_link(pair: Pair) -> None:
    pair.writer._socket.send(b"!")
    pair.reader.ready(pair.reader.socket_fd(), select.EPOLLIN)
    with pytest.raises(PeerGone, match="it spoke on the socket"):
        pair.read(1)


@pytest.mark.parametrize("num_bytes", [0, MIN_RING_BYTES - 1])
def test_an_impossible_ring_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"a ring of {num_bytes} bytes: must be 4096 to"):
        Ring.create(num_bytes)


@pytest.mark.parametrize("other", ["a write", "another reservation"])
def test_what_is_reserved_stays_in_its_place_though_the_ring_is_emptied_meanwhile(pair: Pair, other: str) -> None:
    pair.writer.write([b"before"])
    payload = pair.writer.reserve(4, 8)
    assert payload is not None
    pair.data_arrived()
    assert pair.read(6) == b"before"
    if other == "a write":
        assert pair.writer.write([b"too early"]) == 0
    else:
        assert pair.writer.reserve(1, 1) is None
    payload[:] = b"computed"
    pair.writer.commit(b"head", 8)
    pair.writer.write([b"after"])
    assert pair.reader.look()
    assert pair.read(64) == b"headcomputedafter"


def ring(is_sealed: bool = True, room_fd: int | None = None) -> list[int]:
    memory_fd = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory_fd, MIN_RING_BYTES + HEADER_BYTES)
    if is_sealed:
        fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, SEALS)
    return [memory_fd, os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK) if room_fd is None else room_fd]


WRONG: dict[str, Callable[[], list[int]]] = {
    "unsealed": lambda: ring() + ring(is_sealed=False),
    "too few": ring,
    "none": list,
    "told of by what blocks": lambda: ring() + ring(room_fd=os.eventfd(0)),
    "told of by what is no eventfd": lambda: ring() + ring(room_fd=os.open("/dev/zero", os.O_RDWR | os.O_NONBLOCK)),
}


@pytest.mark.parametrize("wrong", [*WRONG, "silence"])
def test_wrong_rings_are_refused_and_no_fd_is_kept(wrong: str) -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    sent = WRONG[wrong]() if wrong in WRONG else []
    if wrong in WRONG:
        socket.send_fds(ours, [b"ring"], sent)
    with pytest.raises(Refused, match="rings"):
        receive_rings(theirs, deadline=time.monotonic() + 0.05)
    for fd in sent:
        os.close(fd)
    ours.close()
    theirs.close()
    assert not open_fds() - before


def test_a_ring_leaves_nothing_behind() -> None:
    before = open_fds()
    pair = Pair()
    assert not [name for name in os.listdir("/dev/shm") if "braid" in name]
    pair.close()
    assert not open_fds() - before
