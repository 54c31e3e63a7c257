"""The expert hop from its attention side: real links, scripted expert workers that answer x * (expert + 1)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from braid.actors.dispatch import RemoteExperts
from braid.actors.links import Hello, Link
from braid.actors.messages import DISPATCH, ROWS, Kind
from braid.actors.reactor import Closed, Event, Opened, Reactor, Received
from braid.actors.socket_pipe import SocketPipe
from braid.actors.wire import bytes_of, rows_from
from braid.router.expert_map import Owner, assign, build_map

NUM_EXPERTS, HIDDEN, LAYER = 4, 3, 1
X = torch.arange(6.0).view(2, HIDDEN)
TOPK = torch.tensor([[0, 3], [2, 1]])
EXPECTED = X[:, None] * (TOPK + 1)[..., None]


class Expert:
    """One expert worker: `cut_rows` of its answers are missing; while `is_silent` it answers nothing.

    `held_ns`: how long it says that it had them.
    """

    def __init__(self, name: str, attention: Reactor) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.link = Link(Hello(name, "expert", 1, "host"), SocketPipe(ours, "unix"))
        self.far = Link(Hello("attention", "both", 1, "host"), SocketPipe(theirs, "unix"))
        self.reactor = Reactor()
        self.reactor.add(self.far)
        self.is_silent = False
        self.cut_rows = self.held_ns = 0
        self.num_asked = 0
        attention.add(self.link)

    def answer(self) -> None:
        for event in self.reactor.poll(0):
            if isinstance(event, Received) and not self.is_silent:
                number, _, _, _, _, _, num_pairs = DISPATCH.unpack(event.message.meta)
                payload = event.message.payload
                pairs = np.frombuffer(payload[: 8 * num_pairs], dtype=np.int32).reshape(2, num_pairs)
                x = rows_from(payload[8 * num_pairs :], torch.float32, HIDDEN)
                rows = x[torch.from_numpy(pairs[0].copy())] * torch.from_numpy(pairs[1] + 1)[:, None]
                self.num_asked += 1
                meta = ROWS.pack(number, num_pairs, 0, 0, self.held_ns)
                self.far.send(Kind.ROWS, meta, bytes_of(rows[: len(rows) - self.cut_rows]))


class Post:
    """The attention worker's mail; expert workers get their turn whenever it is read."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.experts = [Expert(f"expert-{i}", self.reactor) for i in range(2)]
        self.deferred: list[Event] = []
        self.reactor.poll(0)
        for expert in self.experts:
            expert.answer()

    def poll(self, timeout_s: float) -> list[Event]:
        for expert in self.experts:
            expert.answer()
        events: list[Event] = self.reactor.poll(min(timeout_s, 1.0))
        return events

    def spin(self, look: Callable[[int, int], Any]) -> Any:
        for expert in self.experts:
            expert.answer()
        return self.reactor.spin(look)

    def defer(self, event: Event) -> None:
        self.deferred.append(event)


@pytest.fixture
def post() -> Iterator[Post]:
    made = Post()
    yield made
    made.reactor.close()
    for expert in made.experts:
        expert.reactor.close()


def remote(post: Post, incarnation: int = 1) -> RemoteExperts:
    """Every expert is on both workers."""
    names = ["expert-0", "expert-1"]
    owners = [Owner(names[0], 1), Owner(names[1], incarnation)]
    made = RemoteExperts(post, NUM_EXPERTS)
    expert_map = build_map(1, NUM_EXPERTS, [LAYER], owners, assign(NUM_EXPERTS, names, 2))
    made.set_map(expert_map, {expert.link.peer.name: expert.link for expert in post.experts})
    return made


def test_rows_come_back_in_slot_order(post: Post) -> None:
    experts = remote(post)
    assert torch.equal(experts.collect(experts.dispatch(LAYER, X, TOPK)), EXPECTED)
    assert experts.take_failed() == {}
    assert post.experts[0].num_asked
    assert post.experts[1].num_asked


def test_a_hop_that_was_noted_late_took_no_less_than_no_time(post: Post) -> None:
    """As when we are stopped between a send and its time: the answer has been in the making for longer, then."""
    experts = remote(post)
    post.experts[0].held_ns = post.experts[1].held_ns = 10**12
    experts.collect(experts.dispatch(LAYER, X, TOPK))
    assert (experts.counters.timed, experts.counters.wire_s) == (2, 0.0)


def test_before_the_first_map_every_row_fails_by_name_and_nothing_breaks(post: Post) -> None:
    experts = RemoteExperts(post, NUM_EXPERTS)
    assert torch.equal(experts.collect(experts.dispatch(LAYER, X, TOPK)), torch.zeros(2, 2, HIDDEN))
    assert sorted(experts.take_failed()) == [0, 1]


def test_an_earlier_life_of_an_owner_is_not_asked(post: Post) -> None:
    experts = remote(post, incarnation=2)
    assert torch.equal(experts.collect(experts.dispatch(LAYER, X, TOPK)), EXPECTED)
    assert post.experts[1].num_asked == 0


def test_a_worker_that_is_gone_is_replaced_in_the_middle_of_a_layer(post: Post) -> None:
    experts = remote(post)
    handle = experts.dispatch(LAYER, X, TOPK)
    post.experts[0].far.close()
    assert torch.equal(experts.collect(handle), EXPECTED)
    assert [type(event) for event in post.deferred] == [Closed]
    assert experts.take_failed() == {}


def test_a_worker_that_answers_wrongly_is_left_out_and_no_event_is_lost(post: Post) -> None:
    experts = remote(post)
    post.experts[0].cut_rows = 1
    handle = experts.dispatch(LAYER, X, TOPK)
    third = Expert("front-0", post.reactor)
    assert torch.equal(experts.collect(handle), EXPECTED)
    assert post.experts[0].link.closed
    third.reactor.close()
    post.poll(0)
    assert [event.link.peer.name for event in post.deferred if isinstance(event, Opened)] == ["front-0"]


def test_replies_that_lay_there_while_we_were_stopped_are_in_time(post: Post) -> None:
    experts = remote(post)
    handle = experts.dispatch(LAYER, X, TOPK)
    for part in handle.pending.values():
        part.expires = 0.0
    assert torch.equal(experts.collect(handle), EXPECTED)
    assert not any(expert.link.closed for expert in post.experts)


def test_a_silent_worker_is_given_up_at_its_deadline(post: Post) -> None:
    experts = remote(post)
    post.experts[0].is_silent = True
    handle = experts.dispatch(LAYER, X, TOPK)
    for part in handle.pending.values():
        part.expires = 0.0
    assert torch.equal(experts.collect(handle), EXPECTED)
    assert "no reply" in str(post.experts[0].link.closed)
    assert not post.experts[1].link.closed


REPLIES: dict[str, Callable[[int, int], tuple[Kind, bytes, bytes]]] = {
    "rows whose head is cut": lambda own, _: (Kind.ROWS, ROWS.pack(own, 2, 0, 0, 0)[:20], bytes(24)),
    "rows without a number": lambda own, _: (Kind.ROWS, b"", bytes(24)),
    "rows that another was asked for": lambda _, other: (Kind.ROWS, ROWS.pack(other, 2, 0, 0, 0), bytes(24)),
    "no experts missing": lambda own, _: (Kind.NOT_RESIDENT, ROWS.pack(own, 0, 0, 0, 0), b""),
    "half an expert missing": lambda own, _: (Kind.NOT_RESIDENT, ROWS.pack(own, 0, 0, 0, 0), bytes(4)),
    "experts missing that there are not": lambda own, _: (
        Kind.NOT_RESIDENT,
        ROWS.pack(own, 0, 0, 0, 0),
        np.array([-1, 2**40]).tobytes(),
    ),
    "what another was asked for missing": lambda _, other: (
        Kind.NOT_RESIDENT,
        ROWS.pack(other, 0, 0, 0, 0),
        np.arange(NUM_EXPERTS).tobytes(),
    ),
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
def test_a_reply_that_makes_no_sense_costs_its_sender_the_link_and_nobody_a_row(
    post: Post, reply: Callable[[int, int], tuple[Kind, bytes, bytes]]
) -> None:
    experts = remote(post)
    post.experts[0].is_silent = post.experts[1].is_silent = True
    handle = experts.dispatch(LAYER, X, TOPK)
    numbers = {part.link.peer.name: number for number, part in handle.pending.items()}
    post.experts[0].far.send(*reply(numbers["expert-0"], numbers["expert-1"]))
    post.experts[1].is_silent = False
    assert torch.equal(experts.collect(handle), EXPECTED)
    assert "cannot be read" in str(post.experts[0].link.closed)
    assert post.experts[1].link.closed is None
    assert experts.take_failed() == {}


def test_an_answer_that_no_link_could_queue_is_asked_for_in_parts(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braid.actors.dispatch.MAX_ANSWER_BYTES", 2 * HIDDEN * 4)
    experts = remote(post)
    x, topk = torch.arange(21.0).view(7, HIDDEN), torch.tensor([[0, 3]] * 7)
    for is_cut in (False, True):
        if is_cut:
            post.experts[0].far.close()
        rows = experts.collect(experts.dispatch(LAYER, x, topk))
        assert torch.equal(rows, x[:, None] * (topk + 1)[..., None])
    assert sum(expert.num_asked for expert in post.experts) >= 14
    assert experts.take_failed() == {}


Y = X + 10.0
OTHER = torch.tensor([[1, 2], [0, 3]])
OTHER_EXPECTED = Y[:, None] * (OTHER + 1)[..., None]


@pytest.mark.parametrize("first", [0, 1])
def test_two_dispatches_are_open_at_once_and_collected_in_any_order(post: Post, first: int) -> None:
    experts = remote(post)
    handles = [experts.dispatch(LAYER, X, TOPK), experts.dispatch(LAYER, Y, OTHER)]
    expected = [EXPECTED, OTHER_EXPECTED]
    for index in (first, 1 - first):
        assert torch.equal(experts.collect(handles[index]), expected[index])
    assert experts.take_failed() == {}


@pytest.mark.parametrize("end", ["dies", "is silent", "answers wrongly"])
def test_a_worker_that_is_lost_costs_no_open_dispatch_anything(post: Post, end: str) -> None:
    experts = remote(post)
    handles = [experts.dispatch(LAYER, X, TOPK), experts.dispatch(LAYER, Y, OTHER)]
    if end == "dies":
        post.experts[0].far.close()
    elif end == "is silent":
        post.experts[0].is_silent = True
        for handle in handles:
            for part in handle.pending.values():
                part.expires = 0.0
    else:
        post.experts[0].cut_rows = 1
    assert torch.equal(experts.collect(handles[0]), EXPECTED)
    assert torch.equal(experts.collect(handles[1]), OTHER_EXPECTED)
    assert experts.counters.resent == 2
    assert experts.take_failed() == {}


def test_rows_of_the_second_micro_batch_fail_under_their_place_in_the_batch(post: Post) -> None:
    experts = remote(post)
    for expert in post.experts:
        expert.far.close()
    handles = [experts.dispatch(LAYER, X, TOPK), experts.dispatch(LAYER, Y, OTHER, first_row=2)]
    for handle in handles:
        assert torch.equal(experts.collect(handle), torch.zeros(2, 2, HIDDEN))
    assert sorted(experts.take_failed()) == [0, 1, 2, 3]


def test_what_a_broken_step_left_open_is_not_asked_for_again(post: Post) -> None:
    experts = remote(post)
    experts.dispatch(LAYER, X, TOPK)
    assert experts.take_failed() == {}
    post.experts[0].far.close()
    assert torch.equal(experts.collect(experts.dispatch(LAYER, Y, OTHER)), OTHER_EXPECTED)
    assert experts.counters.resent <= 1


def test_memory_for_rows_is_used_again(post: Post) -> None:
    experts = remote(post)
    addresses = set()
    for _ in range(20):
        handles = [experts.dispatch(LAYER, X, TOPK), experts.dispatch(LAYER, Y, OTHER)]
        rows = [experts.collect(handle) for handle in handles]
        assert torch.equal(rows[0], EXPECTED)
        assert torch.equal(rows[1], OTHER_EXPECTED)
        addresses |= {collected.data_ptr() for collected in rows}
    assert len(addresses) <= 4
