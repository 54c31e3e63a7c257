"""Pairs between real processes over gloo: each lives and dies alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from leftovers import open_fds
from pair_processes import CPU, HOST, LONG_S, Peer, Process
from waiting import until

from braid.actors.links import DialFailed, LinkClosed
from braid.actors.messages import pack
from braid.actors.nccl_pair import ATTENTION, EXPERT, PairTimeout, RowPair, _abort, join
from braid.actors.pair_store import MAX_ENTRIES, PairStore


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
    assert again.pair is not first.pair
    assert first.pair.closed
    again.ask(7)
    second.ask(8)
    second.conn.send(0)
    assert second.conn.recv() == "expert-1"  # it has ended without an error


def test_a_peer_that_hangs_costs_its_pair_when_the_deadline_passes(make: Callable[[str], Peer]) -> None:
    hanging, other = make("expert-0"), make("expert-1")
    hanging.ask(2)
    hanging.signal(signal.SIGSTOP)
    with pytest.raises(PairTimeout, match=r"no answer of expert-0 within 0.2009 s"):
        hanging.ask(2, timeout_s=0.2009)
    with pytest.raises(LinkClosed, match=r"closed: no answer of expert-0 within 0.2009 s"):
        hanging.pair.receive(torch.zeros(1))
    other.ask(2)


class Stuck:
    """A group of torch's whose communicator does not end in time."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def _group_start(self) -> None:
        self._calls.append("start")

    def abort(self) -> None:
        self._calls.append("abort")
        raise RuntimeError("Timed out in ProcessGroup abort")

    def _group_end(self) -> None:
        self._calls.append("end")


def test_a_communicator_that_does_not_end_is_told_of_and_harms_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    _abort("expert-0", [Stuck(calls), Stuck(calls)])
    assert calls == ["start", "abort", "abort", "end"]
    assert "a communicator with expert-0 does not end: Timed out" in caplog.text


def test_nobody_comes_or_nobody_is_there() -> None:
    store = PairStore("attention-0", lambda entry: None, timeout_s=0.3)
    with pytest.raises(DialFailed, match=r"no pair with attention-0: silent for 0.3 s"):
        join("attention-0", EXPERT, store, HOST, CPU, timeout_s=0.3)

    def refuse(entry: bytes) -> None:
        raise LinkClosed("the link to expert-0 is closed: it died")

    with pytest.raises(DialFailed, match="no pair with expert-0: the link to expert-0 is closed: it died"):
        join("expert-0", ATTENTION, PairStore("expert-0", refuse, LONG_S), HOST, CPU, LONG_S)


@pytest.mark.parametrize(("last", "rank"), [(0, EXPERT), (1, ATTENTION), (2, EXPERT)])
def test_a_peer_that_is_killed_while_the_two_find_each_other(last: int, rank: int) -> None:
    """`last`: the entry of its with which it dies; before all, at 0."""
    peer = Process("worker-0", rank)

    def heard(number: int) -> None:
        if number == last:
            peer.signal(signal.SIGKILL)
            peer.process.join(LONG_S)

    if not last:
        peer.signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises((DialFailed, LinkClosed), match="worker-0"):
        peer.join(timeout_s=1.0, heard=heard).receive(torch.zeros(1)).wait(LONG_S)
    assert time.monotonic() - begun < LONG_S / 2
    peer.end()


def stores() -> tuple[PairStore, PairStore]:
    """Each hears what the other tells."""
    first = PairStore("expert-0", lambda entry: second.hear(entry), LONG_S)
    second = PairStore("attention-0", first.hear, LONG_S)
    return first, second


def test_no_store_listens() -> None:
    """Law 10: nobody can reach it but by the link."""
    before = open_fds()
    ours, theirs = stores()
    ours.set("here", b"1")
    assert theirs.get("here") == b"1"
    assert theirs.check(["here"])
    assert not theirs.check(["here", "there"])
    assert not open_fds() - before


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (pack(["key"]), "is no entry: ValueError.'not enough values"),
        (pack([1, b"value"]), "text"),
        (pack(["key", "value"]), "text"),
        (pack(["key", bytes(1 << 16)]), "at most 65536 bytes"),
        (pack(3), "is no entry: TypeError"),
        (b"\xc1", r"b'\\xc1' of 1 bytes is no entry"),
    ],
)
def test_what_is_no_entry_is_refused(entry: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PairStore("expert-0", lambda entry: None, LONG_S).hear(entry)


def test_entries_are_bounded() -> None:
    store = PairStore("expert-0", lambda entry: None, LONG_S)
    for number in range(MAX_ENTRIES):
        store.hear(pack([str(number), b""]))
    with pytest.raises(ValueError, match="expert-0 has sent more than 64 entries"):
        store.hear(pack(["more", b""]))


def both() -> tuple[RowPair, RowPair]:
    """Both ends in this process."""
    ours, theirs = stores()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(join, "attention-0", EXPERT, theirs, HOST, CPU, LONG_S)
        return join("expert-0", ATTENTION, ours, HOST, CPU, LONG_S), accepted.result()


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
    until(lambda: count() <= before, "the end of all threads")  # a thread is listed a moment longer than it is joined
