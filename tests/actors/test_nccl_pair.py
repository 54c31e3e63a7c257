"""Pairs between real processes over gloo: each lives and dies alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pair_processes import CPU, HOST, LONG_S, Peer

from braid.actors.links import DialFailed, LinkClosed
from braid.actors.nccl_pair import OfferedPair, PairTimeout, RowPair, join


@pytest.fixture
def make() -> Iterator[Callable[[str], Peer]]:
    made: list[Peer] = []

    def start(name: str) -> Peer:
        made.append(Peer(name))
        return made[-1]

    yield start
    for peer in made:
        peer.end()


def test_one_dies_and_the_other_goes_on_and_a_new_life_gets_a_new_pair(make: Callable[[str], Peer]) -> None:
    first, second = make("expert-0"), make("expert-1")
    for num_rows in (1, 200, 3):
        first.ask(num_rows)
        second.ask(num_rows)
    waiting = first.pair.receive(torch.zeros(1, 16))
    first.signal(signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(LinkClosed, match="the pair with expert-0 is closed: expert-0 is gone"):
        waiting.wait(LONG_S)
    assert time.monotonic() - begun < LONG_S / 2
    with pytest.raises(LinkClosed, match="the pair with expert-0 is closed"):
        first.pair.send(torch.zeros(1, 16))
    second.ask(50)
    again = make("expert-0")
    assert again.offer != first.offer
    again.ask(7)
    second.ask(8)
    second.conn.send(0)
    assert second.conn.recv() == "expert-1"  # it has ended without an error


def test_a_peer_that_hangs_costs_its_pair_when_the_deadline_passes(make: Callable[[str], Peer]) -> None:
    hanging, other = make("expert-0"), make("expert-1")
    hanging.ask(2)
    hanging.signal(signal.SIGSTOP)
    with pytest.raises(PairTimeout, match=r"no answer of expert-0 within 0.2 s"):
        hanging.ask(2, timeout_s=0.2)
    with pytest.raises(LinkClosed, match=r"closed: no answer of expert-0 within 0.2 s"):
        hanging.pair.receive(torch.zeros(1))
    other.ask(2)


def test_nobody_comes_or_nobody_is_there() -> None:
    offered = OfferedPair("attention-0", HOST, CPU, timeout_s=0.3)
    with pytest.raises(DialFailed, match="no pair with attention-0"):
        offered.accept()
    gone = offered.offer
    del offered
    with pytest.raises(DialFailed, match="no pair with expert-0"):
        join("expert-0", gone, HOST, CPU, timeout_s=0.3)


def both() -> tuple[RowPair, RowPair]:
    """Both ends in this process."""
    offered = OfferedPair("attention-0", HOST, CPU, LONG_S)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(offered.accept)
        return join("expert-0", offered.offer, HOST, CPU, LONG_S), accepted.result()


def test_what_was_on_its_way_when_a_pair_was_closed_is_not_waited_for() -> None:
    ours, _theirs = both()
    waiting = ours.receive(torch.zeros(1))
    ours.close("it has left the view")
    ours.close("again")
    with pytest.raises(LinkClosed, match="the pair with expert-0 is closed: it has left the view"):
        waiting.wait(LONG_S)


def test_messages_that_meet_pass_and_rows_with_gaps_are_a_bug_that_is_named() -> None:
    ours, theirs = both()
    rows = torch.arange(300_000.0)
    sent = [pair.send(rows) for pair in (ours, theirs)]
    for pair in (ours, theirs):
        answer = torch.zeros_like(rows)
        pair.receive(answer).wait(LONG_S)
        assert torch.equal(answer, rows)
    for transfer in sent:
        transfer.wait(LONG_S)
    with pytest.raises(AssertionError, match="strides"):
        ours.send(torch.zeros(4, 4)[:, :2])


def test_a_pair_that_is_closed_leaves_nothing_open() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) + len(os.listdir("/proc/self/task"))

    ours, theirs = both()
    ours.close()
    theirs.close()
    before = count()
    for _ in range(4):
        ours, theirs = both()
        ours.close()
        theirs.close()
    assert count() <= before
