"""A hop over rings: the native calls against the Python forms that define them, and against peers that send rubbish."""

from __future__ import annotations

import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from braid.actors import _native
from braid.actors.direct_answers import DirectAnswers
from braid.actors.expert_host import ExpertHost
from braid.actors.expert_server import ExpertServer
from braid.actors.framing import HEADER, MAGIC, VERSION, FrameReader
from braid.actors.links import Hello, Link
from braid.actors.messages import DISPATCH, ROWS, Kind
from braid.actors.pairs import Ints, encode, split
from braid.actors.reactor import Closed, Event, Opened, Reactor
from braid.actors.shm_pipe import ShmPipe
from braid.actors.shm_setup import receive_rings, send_rings
from braid.actors.socket_pipe import SocketPipe
from braid.actors.wire import bytes_of
from braid.model.network_weights import ExpertWeights
from braid.model.torch_ops import TorchOps

RING_BYTES, HIDDEN, NUM_EXPERTS, LAYER = 16 << 10, 6, 8, 2
ROW_BYTES = 4 * HIDDEN


@contextmanager
def pipe_pair(ring_bytes: int = RING_BYTES) -> Iterator[tuple[ShmPipe, ShmPipe]]:
    ours, theirs = socket.socketpair()
    pipes = send_rings(ours, ring_bytes), receive_rings(theirs, time.monotonic() + 5)
    yield pipes
    for pipe in pipes:
        pipe.close()


@contextmanager
def idle_epoll() -> Iterator[int]:
    with select.epoll() as epoll:
        yield epoll.fileno()


def dispatch(
    lanes: tuple[_native.Lane | None, ...], x: torch.Tensor, experts: Ints, owner_of: Ints, top_k: int
) -> tuple[Ints, Ints, list[tuple[int, int, int, int, float]]]:
    order, loads = np.empty_like(experts), np.zeros(len(owner_of), dtype=np.int64)
    args = (experts, top_k, x.data_ptr(), x.shape[1] * x.itemsize, 7, 3, LAYER, 1, 0, order, loads)
    return order, loads, _native.dispatch(lanes, owner_of, *args)


@given(
    rows=st.integers(1, 9),
    top_k=st.integers(1, 4),
    num_owners=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_native_dispatch_is_the_message_that_python_would_send(
    rows: int, top_k: int, num_owners: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    experts, owner_of = rng.integers(0, NUM_EXPERTS, rows * top_k), rng.integers(-1, num_owners, NUM_EXPERTS)
    x = torch.from_numpy(rng.standard_normal((rows, HIDDEN)).astype(np.float32))
    has_ring = data.draw(st.lists(st.booleans(), min_size=num_owners, max_size=num_owners))
    with contextmanager(_all_pairs)(num_owners) as pairs:
        lanes = tuple(near.lane if has else None for (near, _), has in zip(pairs, has_ring, strict=True))
        order, loads, parts = dispatch(lanes, x, experts, owner_of, top_k)
        expected, counts = split(experts, np.arange(len(experts)), owner_of, num_owners)
        assert order.tolist() == expected.tolist()
        assert loads.tolist() == np.bincount(experts, minlength=NUM_EXPERTS).tolist()
        assert [(owner, num) for owner, _, num, _, _ in parts] == [(i - 1, n) for i, n in enumerate(counts) if n]
        number = 7
        for owner, first, num, num_bytes, _ in parts:
            assert (num_bytes >= 0) == (owner >= 0 and has_ring[owner])
            if num_bytes < 0:
                continue
            out = np.zeros(8 * num + x.nbytes, dtype=np.uint8)
            num_rows = encode(x, experts, order[first : first + num], top_k, out)
            assert num_bytes == 8 * num + num_rows * ROW_BYTES
            far = pairs[owner][1]
            assert far.look()
            frame = FrameReader().read(far)
            assert frame is not None
            kind, meta, payload, _ = frame
            assert (kind, DISPATCH.unpack(meta)) == (Kind.DISPATCH, (number, 3, LAYER, 1, 0, num_rows, num))
            assert bytes(payload) == out[:num_bytes].tobytes()
            assert not far.look()
            number += 1


def _all_pairs(num: int) -> Iterator[list[tuple[ShmPipe, ShmPipe]]]:
    managers = [pipe_pair() for _ in range(num)]
    yield [manager.__enter__() for manager in managers]
    for manager in managers:
        manager.__exit__(None, None, None)


def test_nothing_overtakes_what_waits_for_room_or_was_reserved() -> None:
    x, experts, owner_of = torch.ones(1, HIDDEN), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    with pipe_pair() as (near, far):
        assert near.write([bytes(RING_BYTES + 1)]) == RING_BYTES
        far.look()
        far.consume(RING_BYTES)
        assert dispatch((near.lane,), x, experts, owner_of, 1)[2][0][3] == -1
        assert near.write([b"rest"]) == 4
        assert dispatch((near.lane,), x, experts, owner_of, 1)[2][0][3] > 0
        assert near.reserve(4, 100) is not None
        assert near.write([b"later"]) == 0
        assert dispatch((near.lane,), x, experts, owner_of, 1)[2][0][3] == -1
        near.commit(b"head", 100)
        near.hang_up()
        assert dispatch((near.lane,), x, experts, owner_of, 1)[2][0][3] == -1


def test_a_dispatch_that_its_ring_has_no_room_for_is_left_to_others() -> None:
    x, experts, owner_of = torch.ones(500, HIDDEN), np.zeros(500, dtype=np.int64), np.zeros(1, dtype=np.int64)
    with pipe_pair() as (near, far):
        assert dispatch((near.lane,), x, experts, owner_of, 1)[2][0][3] == 500 * ROW_BYTES + 8 * 500
        assert dispatch((near.lane,), x, experts, owner_of, 1)[2][0][3] == -1
        assert far.look()


@pytest.mark.parametrize("wrong", [-1, NUM_EXPERTS])
def test_an_expert_that_there_is_not_is_an_error_and_nothing_is_sent(wrong: int) -> None:
    with pipe_pair() as (near, far):
        with pytest.raises(IndexError):
            dispatch((near.lane,), torch.ones(2, HIDDEN), np.array([0, wrong]), np.zeros(NUM_EXPERTS, np.int64), 1)
        assert not far.look()


class Taking:
    """take_dispatch with fences around the memory that it fills."""

    MAX_ROWS, MAX_PAIRS = 4, 6

    def __init__(self) -> None:
        self.x = np.full(self.MAX_ROWS * ROW_BYTES + 64, 77, dtype=np.uint8)
        self.rows, self.places = (np.full(self.MAX_PAIRS + 8, 77, dtype=np.int64) for _ in range(2))
        self.places_of = np.full((LAYER + 1, NUM_EXPERTS), -1)
        self.places_of[LAYER, : NUM_EXPERTS - 1] = np.arange(NUM_EXPERTS - 1)

    def look(self, *pipes: ShmPipe) -> Any:
        x, rows, places = self.x[:-64].data, self.rows[:-8], self.places[:-8]
        with idle_epoll() as epoll:
            lanes = tuple(pipe.lane for pipe in pipes)
            return _native.take_dispatch(lanes, ROW_BYTES, 0, self.places_of, NUM_EXPERTS, x, rows, places, epoll, 0)

    def is_fenced(self) -> bool:
        return all((memory[-fence:] == 77).all() for memory, fence in ((self.x, 64), (self.rows, 8), (self.places, 8)))


def frame(kind: int, meta: bytes, payload: bytes) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, len(meta), len(payload)) + meta + payload


def good(
    num_rows: int = 1, num_pairs: int = 2, expert: int = 3, row: int = 0, layer: int = LAYER, code: int = 0
) -> bytes:
    pairs = np.array([row] * num_pairs + [expert] * num_pairs, dtype=np.int32).tobytes()
    meta = DISPATCH.pack(9, 1, layer, 0, code, num_rows, num_pairs)
    return frame(Kind.DISPATCH, meta, pairs + bytes(range(num_rows * ROW_BYTES)))


def test_a_plain_dispatch_is_taken_and_answered() -> None:
    taking = Taking()
    with pipe_pair() as (near, far):
        assert taking.look(far) == _native.QUIET
        near.write([good(num_rows=2, num_pairs=3, row=1)])
        index, number, layer, num_rows, num_pairs, arrived, start, num_bytes = taking.look(far)
        assert (index, number, layer, num_rows, num_pairs) == (0, 9, LAYER, 2, 3)
        assert num_bytes == len(good(num_rows=2, num_pairs=3))
        assert bytes(taking.x[: 2 * ROW_BYTES]) == bytes(range(2 * ROW_BYTES))
        assert (taking.rows[:3].tolist(), taking.places[:3].tolist()) == ([1] * 3, [3] * 3)
        assert taking.is_fenced()
        far.lane.outgoing(start, 3 * ROW_BYTES)[:] = bytes([5]) * 3 * ROW_BYTES
        _native.answer(far.lane, 9, 3, arrived, arrived + 10, arrived + 30)
        with idle_epoll() as epoll:
            found = _native.take_rows((None, near.lane), epoll, 0)
        assert isinstance(found, tuple)
        assert found[:4] == (1, 9, 10, 20)
        assert found[5] == 3 * ROW_BYTES
        assert start % 64 == 0  # of an empty ring, whose memory begins on a page
        out = torch.zeros(4, HIDDEN)
        _native.scatter_rows(near.lane, found[6], ROW_BYTES, np.array([2, 0, 3]), bytes_of(out))
        near.consume(found[7])
        assert not near.look()
        assert out.view(torch.uint8).tolist() == [[5] * ROW_BYTES, [0] * ROW_BYTES, [5] * ROW_BYTES, [5] * ROW_BYTES]
        with pytest.raises(ValueError, match="nothing was reserved"):
            _native.answer(far.lane, 9, 3, 0, 0, 0)
        with pytest.raises(ValueError, match="no such rows"):
            _native.scatter_rows(near.lane, RING_BYTES - 1, ROW_BYTES, np.array([0]), bytes_of(out))
        with pytest.raises(IndexError):
            _native.scatter_rows(near.lane, 0, ROW_BYTES, np.array([4]), bytes_of(out))


SPECIAL = {
    "another kind": frame(Kind.KV_DONE, b"?" * DISPATCH.size, b""),
    "another layer": good(layer=LAYER - 1),
    "a layer beyond all": good(layer=60_000),
    "an expert that is not here": good(expert=NUM_EXPERTS - 1),
    "an expert that there is not": good(expert=NUM_EXPERTS),
    "a negative expert": good(expert=-1),
    "a row that there is not": good(row=1),
    "a negative row": good(row=-1),
    "another dtype": good(code=1),
    "no pairs": good(num_pairs=0),
    "no pairs of a layer that is not here": good(num_pairs=0, layer=0),
    "too many rows": good(num_rows=5),
    "too many pairs": good(num_pairs=7),
    "less than it says": frame(Kind.DISPATCH, DISPATCH.pack(9, 1, LAYER, 0, 0, 2**32 - 1, 2**32 - 1), b"1234"),
    "a part of a message": good()[:-1],
    "a part of a header": good()[:5],
    "two messages": good() + good(),
    "no frame": b"neither a header nor anything like one, and long enough to be looked at",
    "a length beyond all": HEADER.pack(MAGIC, VERSION, Kind.DISPATCH, DISPATCH.size, 2**64 - 1) + bytes(DISPATCH.size),
}


@pytest.mark.parametrize("stream", SPECIAL.values(), ids=SPECIAL.keys())
def test_what_is_not_plain_is_left_where_it_is(stream: bytes) -> None:
    taking = Taking()
    with pipe_pair() as (near, far):
        near.write([stream])
        assert taking.look(far) == _native.NEWS
        assert far.look()
        view, start, end = far.window()
        assert bytes(view[start:end]) == stream
        assert taking.is_fenced()


def test_dispatches_of_two_askers_are_left_to_become_one_batch() -> None:
    taking = Taking()
    with pipe_pair() as (near, far), pipe_pair() as (other, other_far):
        near.write([good()])
        other.write([good()])
        assert taking.look(far, other_far) == _native.NEWS
        assert far.look()
        assert other_far.look()


@given(stream=st.binary(max_size=300), meta=st.binary(min_size=28, max_size=28), cut=st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_rubbish_overruns_nothing(stream: bytes, meta: bytes, cut: int) -> None:
    taking = Taking()
    with pipe_pair() as (near, far):
        near.write([frame(Kind.DISPATCH, meta, stream)[:cut] + stream])
        taking.look(far)
        assert taking.is_fenced()
    with pipe_pair() as (near, far), idle_epoll() as epoll:
        near.write([frame(Kind.ROWS, (meta + meta)[: ROWS.size], stream)[:cut]])
        found = _native.take_rows((far.lane,), epoll, 0)
        assert not isinstance(found, tuple) or found[5:7] == (len(stream), HEADER.size + ROWS.size)


class Asker:
    """The near end of a ring to an expert server that is asked through its direct way."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        near, far = send_rings(ours, RING_BYTES), receive_rings(theirs, time.monotonic() + 5)
        self.near = Link(Hello("expert", "expert", 1, "host"), near)
        self.far = Link(Hello("attention", "both", 1, "host"), far)
        self.reactor = Reactor()
        self.reactor.add(self.far)
        generator = torch.Generator().manual_seed(3)
        w13 = torch.randn(NUM_EXPERTS, 8, HIDDEN, generator=generator)
        w2 = torch.randn(NUM_EXPERTS, HIDDEN, 4, generator=generator)
        ops = TorchOps()
        stacks = ops.pack_experts(w13, is_gate_up=True), ops.pack_experts(w2)
        host = ExpertHost({LAYER: ExpertWeights(*stacks, tuple(range(NUM_EXPERTS)), ops)}, NUM_EXPERTS)
        self.direct = DirectAnswers(host, HIDDEN, NUM_EXPERTS, torch.float32, Counter())
        self.server = ExpertServer(host, HIDDEN, NUM_EXPERTS, torch.float32)
        self.events: list[Event] = self.reactor.poll(0)

    def spin(self, look: Callable[[int, int], Any]) -> Any:
        return self.reactor.spin(look)

    def ask(self, is_direct: bool) -> bytes:
        self.near._pipe.write([good(num_rows=2, num_pairs=4, row=1)])
        if is_direct:
            assert self.direct.turn(self)
        else:
            self.server.turn(self.reactor.poll(0))
        assert self.near.look()
        message = self.near.receive()
        assert message is not None
        number, num_pairs, queue_ns, compute_ns, held_ns = ROWS.unpack(message.meta)
        assert (message.kind, number, num_pairs) == (Kind.ROWS, 9, 4)
        assert queue_ns + compute_ns <= held_ns
        return bytes(message.payload)

    def close(self) -> None:
        self.reactor.close()
        self.near.close()


@pytest.fixture
def asker() -> Iterator[Asker]:
    made = Asker()
    made.direct.note(made.events)
    yield made
    made.close()


def test_the_direct_answer_has_the_bits_of_the_other_one(asker: Asker) -> None:
    answers = {asker.ask(is_direct) for is_direct in (True, False, True, True, False)}
    assert len(answers) == 1
    assert asker.far.messages_received == asker.far.messages_sent == 5


def test_a_peer_that_sends_rubbish_loses_its_link_on_the_slower_way(asker: Asker) -> None:
    asker.near._pipe.write([good(row=1, num_rows=1)])
    assert not asker.direct.turn(asker)
    asker.server.turn(asker.reactor.poll(0))
    assert "cannot be read" in str(asker.far.closed)
    assert not asker.direct.turn(asker)
    asker.direct.note(asker.reactor.poll(1.0))
    assert not asker.direct.turn(asker)


def test_an_asker_without_a_ring_is_left_to_messages(asker: Asker) -> None:
    ours, theirs = socket.socketpair()
    link = Link(Hello("attention", "both", 1, "host"), SocketPipe(ours, "unix"))
    asker.direct.note([Opened(link)])
    assert len({asker.ask(is_direct=True) for _ in range(2)}) == 1
    asker.direct.note([Closed(link, "over"), Closed(asker.far, "over")])
    assert not asker.direct.turn(asker)
    link.close()
    theirs.close()


def test_a_closed_lane_is_used_no_more_and_its_memory_goes_with_its_last_user() -> None:
    with pipe_pair() as (near, far):
        far.write([frame(Kind.ROWS, ROWS.pack(1, 1, 0, 0, 0), b"x" * 100)])
        near.look()
        hold, memory = near.hold(ROWS.size + HEADER.size + 100), near.lane.incoming(0, 18)
    assert bytes(memory[:2]) == MAGIC
    with idle_epoll() as epoll:
        assert _native.take_rows((near.lane,), epoll, 0) == _native.NEWS
    for use in (near.lane.look, lambda: near.lane.write([b"x"]), lambda: near.lane.consume(1)):
        with pytest.raises(ValueError, match="closed"):
            use()
    del hold
    memory.release()
