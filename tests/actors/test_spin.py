"""Waits that begin awake: no message is overlooked whether an end spins, dozes off or sleeps, and idleness is quiet."""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from link_peer import ECHO, TIMEOUT_S, TRANSPORTS, LinkHost

from braid.actors import _native
from braid.actors.reactor import Closed, Reactor, Received
from braid.actors.spin import Outcome, Patience, spin

every_transport = pytest.mark.parametrize("transport", TRANSPORTS)
Transport = Literal["shm", "unix", "tcp"]
ROUNDS = 20_000


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LinkHost]:
    made = LinkHost(tmp_path)
    yield made
    made.close()


@every_transport
def test_no_wake_up_is_lost_between_two_processes(host: LinkHost, transport: Transport) -> None:
    """A lost one would leave both ends asleep: a wait that takes TIMEOUT_S. One too many is no news, and no harm."""
    link = host.start("echo", transport).link
    rng = random.Random(5)
    for number in range(ROUNDS):
        burst = rng.choice((1, 1, 1, 2, 5))
        for _ in range(burst):
            link.send(ECHO, b"%d" % number, bytes(rng.randrange(200)))
        answers = 0
        while answers < burst:
            began = time.monotonic()
            events = host.reactor.poll(TIMEOUT_S, is_urgent=rng.random() < 0.5)
            assert time.monotonic() - began < TIMEOUT_S
            answers += sum(isinstance(event, Received) for event in events)
        assert answers == burst


def test_a_spin_sees_a_ring_a_socket_and_a_wake_from_a_thread(host: LinkHost) -> None:
    far = Reactor()
    for transport in TRANSPORTS:
        near, dialed = host.dial(transport, far)
        dialed.send(ECHO, b"hello")
        host.until(lambda near=near: bool(host.received(near)), "a message")
    thread = threading.Thread(target=host.reactor.wake)
    thread.start()
    assert host.reactor.poll(TIMEOUT_S, is_urgent=True) == []
    thread.join()
    far.close()


def test_the_end_of_a_peer_is_seen_by_an_urgent_wait(host: LinkHost) -> None:
    peer = host.start("deaf", "shm")
    peer.kill()
    host.events.clear()
    while not host.events:  # a wait may end early
        host.events += host.reactor.poll(TIMEOUT_S, is_urgent=True)
    assert [type(event) for event in host.events] == [Closed]


def test_an_idle_wait_spins_for_a_moment_and_then_sleeps(host: LinkHost) -> None:
    """Spinning through all of it would yield some hundred thousand times: counted, not timed."""
    host.start("echo", "shm")
    before = _num_switches()
    assert host.reactor.poll(0.5, is_urgent=True) == []
    assert _num_switches() - before < 20_000
    before = _num_switches()
    assert host.reactor.poll(0.5) == []
    assert _num_switches() - before < 50


def _num_switches() -> int:
    status = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)


def test_a_spin_ends_by_itself() -> None:
    with select.epoll() as epoll:
        assert spin((), epoll.fileno()) in (Outcome.QUIET, Outcome.CROWDED)


def test_who_finds_its_core_wanted_spends_ever_more_waits_asleep() -> None:
    patience = Patience()
    asleep: list[int] = []
    for _ in range(8):
        while not patience.is_worth_it():
            asleep[-1] += 1
        patience.learn(Outcome.CROWDED)
        asleep.append(0)
    assert asleep[:-1] == [1, 3, 7, 15, 31, 63, 63]


def test_patience_comes_back_with_answers_that_were_worth_it() -> None:
    patience = Patience()
    for _ in range(8):
        while not patience.is_worth_it():
            pass
        patience.learn(Outcome.CROWDED)
    while not patience.is_worth_it():
        pass
    for _ in range(6):
        patience.learn(Outcome.NEWS)
        assert patience.is_worth_it()
    patience.learn(Outcome.CROWDED)
    assert [patience.is_worth_it() for _ in range(2)] == [False, True]


def test_an_answer_that_did_not_come_in_time_proves_nothing() -> None:
    patience = Patience()
    patience.learn(Outcome.QUIET)
    assert patience.is_worth_it()


def test_the_outcomes_are_those_of_the_native_module() -> None:
    assert (Outcome.QUIET, Outcome.NEWS, Outcome.CROWDED) == (_native.QUIET, _native.NEWS, _native.CROWDED)
