"""What an expert worker decides without weights: whose rows come next, and which messages it refuses."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch

from braid.actors.expert_host import Slice
from braid.actors.expert_server import PREFILL_PATIENCE_S, Job, jobs_of, next_batch
from braid.actors.links import Hello, Link, Message
from braid.actors.messages import DISPATCH, Kind
from braid.actors.reactor import Event, Reactor, Received
from braid.actors.socket_pipe import SocketPipe
from braid.actors.wire import bytes_of

HIDDEN, NUM_EXPERTS = 3, 4
EMPTY = Slice(torch.empty(0, HIDDEN), memoryview(b""), 0)


@pytest.fixture
def link() -> Link:
    left, right = socket.socketpair()
    right.close()
    return Link(Hello("attention", "both", 1, "host"), SocketPipe(left, "unix"))


def job(link: Link, number: int, layer: int, phase: int, arrived: float = 0.0) -> Job:
    return Job(link, number, layer, phase, EMPTY, arrived)


def test_decode_goes_first_and_equals_share_a_batch(link: Link) -> None:
    jobs = [job(link, 1, 5, 1), job(link, 2, 3, 0), job(link, 3, 4, 0), job(link, 4, 3, 0)]
    order = []
    while jobs:
        batch, jobs = next_batch(jobs, now=0.0)
        order.append([job.number for job in batch])
    assert order == [[2, 4], [3], [1]]
    link.close()


def test_a_prompt_does_not_wait_for_ever_behind_decodes(link: Link) -> None:
    jobs = [job(link, 0, 1, 1, arrived=0.0)]
    now, number = 0.0, 0
    while any(job.number == 0 for job in jobs):
        number, now = number + 1, now + 0.01  # decode workers that ask again as soon as they are answered
        _, jobs = next_batch([*jobs, job(link, number, 2, 0, arrived=now)], now)
        assert now < 2 * PREFILL_PATIENCE_S
    link.close()


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
