"""What an expert worker decides without weights: whose rows come next, and which messages it refuses."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch

from braid.actors.expert_host import Slice
from braid.actors.expert_server import MOST_OPEN, MOST_RIDERS, PREFILL_PATIENCE_S, Job, bounded, jobs_of, next_batch
from braid.actors.links import Hello, Link, Message
from braid.actors.messages import DISPATCH, Kind
from braid.actors.reactor import Event, Reactor, Received
from braid.actors.socket_pipe import SocketPipe
from braid.actors.wire import bytes_of

HIDDEN, NUM_EXPERTS = 3, 4


@pytest.fixture
def link() -> Link:
    left, right = socket.socketpair()
    right.close()
    return Link(Hello("attention", "both", 1, "host"), SocketPipe(left, "unix"))


def job(link: Link, number: int, layer: int, phase: int, arrived: float = 0.0, rows: int = 1) -> Job:
    return Job(link, number, layer, phase, Slice(torch.empty(rows, HIDDEN), memoryview(b""), 0), arrived)


def test_decode_goes_first_and_equals_share_a_batch(link: Link) -> None:
    jobs = [job(link, 1, 5, 1), job(link, 2, 3, 0), job(link, 3, 4, 0), job(link, 4, 3, 0)]
    order = []
    while jobs:
        batch, jobs = next_batch(jobs, now=0.0)
        order.append([job.number for job in batch])
    assert order == [[2, 4], [3], [1]]
    link.close()


def test_prompts_ride_along_with_decode_rows_of_their_layer_where_they_cost_them_no_time(link: Link) -> None:
    few, more, many = MOST_RIDERS // 2, MOST_RIDERS // 2 + 1, MOST_RIDERS + 1
    jobs = [job(link, 1, 3, 1, rows=few), job(link, 2, 3, 1, rows=many), job(link, 3, 3, 0, rows=500)]
    jobs += [job(link, 4, 3, 1, rows=more), job(link, 5, 4, 1, rows=1), job(link, 6, 3, 1, rows=few)]
    batch, rest = next_batch(jobs, now=0.0)
    assert [job.number for job in batch] == [1, 3, 6]
    batch, rest = next_batch(rest, now=0.0)
    assert [job.number for job in batch] == [2, 4]
    assert [job.number for job in rest] == [5]
    link.close()


def test_decode_rows_join_a_prompt_that_has_waited_too_long(link: Link) -> None:
    jobs = [job(link, 1, 3, 1, rows=500), job(link, 2, 3, 0, arrived=1.0), job(link, 3, 4, 0, arrived=1.0)]
    batch, rest = next_batch(jobs, now=1.0)
    assert [[job.number for job in jobs] for jobs in (batch, rest)] == [[1, 2], [3]]
    link.close()


def test_a_prompt_does_not_wait_for_ever_behind_decodes(link: Link) -> None:
    jobs = [job(link, 0, 1, 1, arrived=0.0)]
    now, number = 0.0, 0
    while any(job.number == 0 for job in jobs):
        number, now = number + 1, now + 0.01  # decode workers that ask again as soon as they are answered
        _, jobs = next_batch([*jobs, job(link, number, 2, 0, arrived=now)], now)
        assert now < 2 * PREFILL_PATIENCE_S
    link.close()


def test_who_asks_without_end_loses_the_link_and_nobody_else(link: Link) -> None:
    left, right = socket.socketpair()
    other = Link(Hello("other", "both", 1, "host"), SocketPipe(left, "unix"))
    ours = [job(link, number, 1, 0) for number in range(MOST_OPEN)]
    assert len(bounded([*ours, job(other, 0, 1, 0)])) == MOST_OPEN + 1
    flood = [job(link, MOST_OPEN, 1, 0), job(other, 0, 1, 0)]
    assert [one.link for one in bounded(ours + flood)] == [other]
    assert (link.closed, other.closed) == (
        f"attention has {MOST_OPEN + 1} dispatches open, more than {MOST_OPEN}",
        None,
    )
    other.close()
    right.close()


def test_a_dispatch_that_cannot_be_read_costs_its_sender_the_link_and_nobody_else() -> None:
    reactor = Reactor()
    links: dict[str, Link] = {}
    for name in ("good", "short", "garbled", "beyond", "narrow"):
        ours, theirs = socket.socketpair()
        sender = Link(Hello("expert", "expert", 1, "host"), SocketPipe(theirs, "unix"))
        links[name] = Link(Hello(name, "both", 1, "host"), SocketPipe(ours, "unix"))
        reactor.add(links[name])
        pairs = np.array([[0, 1], [3, 9 if name == "beyond" else 2]], dtype=np.int32)
        num_rows = 3 if name == "short" else 2
        code = 1 if name == "narrow" else 0
        meta = DISPATCH.pack(7, 1, 1, 0, code, num_rows, 2)
        x = torch.ones(2, HIDDEN, dtype=torch.bfloat16 if name == "narrow" else torch.float32)
        sender.send(Kind.DISPATCH, b"?" if name == "garbled" else meta, pairs.data.cast("B"), bytes_of(x))
        sender.close()
    reactor.poll(0)
    events: list[Event] = [event for event in reactor.poll(0) if isinstance(event, Received)]
    jobs = jobs_of(events, HIDDEN, NUM_EXPERTS, torch.float32)
    assert [job.link.peer.name for job in jobs] == ["good"]
    assert [name for name, link in links.items() if link.is_closed_here] == ["short", "garbled", "beyond", "narrow"]
    reactor.close()


@pytest.mark.parametrize("num_pairs", [0, 5])
def test_a_dispatch_without_an_answer_that_a_link_could_take_costs_its_sender_the_link(
    link: Link, num_pairs: int
) -> None:
    hidden = 4 << 20  # a row of 16 MiB
    pairs = np.zeros((2, num_pairs), dtype=np.int32)
    payload = memoryview(bytearray(pairs.tobytes() + bytes(4 * hidden)))
    message = Message(Kind.DISPATCH, DISPATCH.pack(7, 1, 1, 0, 0, 1, num_pairs), payload)
    assert jobs_of([Received(link, message)], hidden, NUM_EXPERTS, torch.float32) == []
    assert f"{num_pairs} pairs where 1 to 4 have an answer" in str(link.closed)
