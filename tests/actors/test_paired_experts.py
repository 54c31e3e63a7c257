"""Rows through pairs between real processes over gloo: the bits of local experts, through deaths and silences."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paired_processes import CPU, HIDDEN, HOST, LAYERS, LONG_S, NUM_EXPERTS, TOP_K, PairedWorker, weights
from torch import Tensor

from braid.actors import paired_experts
from braid.actors.links import Message
from braid.actors.messages import ROWS, Kind, pack
from braid.actors.paired_experts import PairedExperts
from braid.actors.reactor import Event, Reactor, Received
from braid.actors.staging import StagedExperts
from braid.model.experts import LocalExperts
from braid.model.network_weights import PLAIN
from braid.router.expert_map import Owner, assign, build_map

NAMES = ["expert-0", "expert-1"]
GENERATOR = torch.Generator().manual_seed(1)


class Attention:
    """An attention worker's mail and experts, newly linked with the workers of its map."""

    def __init__(self, workers: list[PairedWorker]) -> None:
        self.reactor = Reactor()
        self.links = {worker.name: worker.link() for worker in workers}
        for link in self.links.values():
            self.reactor.add(link)
        self.deferred: list[Event] = []
        self.remote = PairedExperts(self, NUM_EXPERTS, CPU, HOST, "host-a")
        self.experts = StagedExperts(self.remote, PLAIN)
        self.local = LocalExperts(weights())

    def poll(self, timeout_s: float) -> list[Event]:
        events: list[Event] = self.reactor.poll(timeout_s)
        return events

    def spin(self, look: Callable[[int, int], Any]) -> Any:
        return self.reactor.spin(look)

    def defer(self, event: Event) -> None:
        self.deferred.append(event)

    def set_map(self, replicas: int) -> None:
        owners = [Owner(name, 1) for name in NAMES]
        expert_map = build_map(1, NUM_EXPERTS, list(LAYERS), owners, assign(NUM_EXPERTS, NAMES, replicas))
        self.remote.set_map(expert_map, self.links)

    def join(self) -> None:
        """Serves until every worker has a pair."""
        self.serve(lambda: num_paired(self) < len(NAMES))
        assert self.remote.is_paired

    def serve(self, is_waiting: Callable[[], bool]) -> None:
        until = time.monotonic() + LONG_S
        while is_waiting():
            assert time.monotonic() < until, "nothing came"
            events, self.deferred = self.deferred + self.reactor.poll(0.01), []
            for event in events:
                self.remote.hear(event)
            self.remote.end_step()

    def batch(self, rows: int, layer: int) -> tuple[int, Tensor, Tensor]:
        x = torch.randn(rows, HIDDEN, generator=GENERATOR).bfloat16()
        ids = torch.rand(rows, NUM_EXPERTS, generator=GENERATOR).topk(TOP_K).indices
        return layer, x, ids

    def expected(self, batch: tuple[int, Tensor, Tensor]) -> Tensor:
        return self.local.collect(self.local.dispatch(*batch)).clone()

    def computed(self, batch: tuple[int, Tensor, Tensor]) -> Tensor:
        return self.experts.collect(self.experts.dispatch(*batch))

    def proved(self, rows: int = 5) -> None:
        batch = self.batch(rows, LAYERS[0])
        assert torch.equal(self.computed(batch), self.expected(batch))
        assert self.experts.take_failed() == {}


@pytest.fixture(scope="module")
def workers() -> Iterator[list[PairedWorker]]:
    made = [PairedWorker(name) for name in NAMES]
    yield made
    for worker in made:
        worker.end()


@pytest.fixture
def attention(workers: list[PairedWorker]) -> Iterator[Attention]:
    made = Attention(workers)
    yield made
    made.remote.close()
    made.reactor.close()


def num_paired(attention: Attention) -> int:
    return sum(pair is not None and pair.closed is None for pair in attention.remote._pairs.values())


def test_bits_before_and_after_pairs_are_joined_and_with_two_handles_open(attention: Attention) -> None:
    attention.set_map(replicas=1)
    assert not attention.remote.is_paired
    attention.proved()
    attention.join()
    links = attention.links.values()
    sent = sum(link.bytes_sent for link in links)
    for rows in (1, 5, 200):
        attention.proved(rows)
    assert sum(link.bytes_sent for link in links) - sent < 206 * HIDDEN * 2  # less than the rows alone
    batches = [attention.batch(7, layer) for layer in LAYERS]
    for order in ((0, 1), (1, 0)):
        handles = [attention.experts.dispatch(*batch) for batch in batches]
        for index in order:
            assert torch.equal(attention.experts.collect(handles[index]), attention.expected(batches[index]))


def test_nobody_is_asked_for_a_pair_while_all_are_on_one_host(attention: Attention) -> None:
    del attention.links[NAMES[1]]
    attention.set_map(replicas=2)
    assert attention.remote._pairs == {}
    attention.proved()


def test_what_a_broken_step_asked_for_is_not_taken_for_an_answer(attention: Attention) -> None:
    attention.set_map(replicas=1)
    attention.join()
    attention.experts.dispatch(*attention.batch(9, LAYERS[1]))
    attention.experts._send()
    assert attention.experts.take_failed() == {}
    attention.proved()
    attention.proved(20)
    assert attention.remote._sent == {}


def test_a_pair_that_breaks_ends_with_its_link_and_its_rows_are_asked_of_the_other(attention: Attention) -> None:
    attention.set_map(replicas=2)
    attention.join()
    broken, other = attention.links.values()
    pair = attention.remote._pairs[broken]
    assert pair is not None
    pair.close("a fault")
    attention.proved(30)
    assert "a fault" in str(broken.closed)
    assert other.closed is None


def test_who_has_no_pair_any_more_gets_a_copy_over_its_link(attention: Attention) -> None:
    attention.set_map(replicas=1)
    attention.join()
    link = attention.links[NAMES[1]]
    pair, attention.remote._pairs[link] = attention.remote._pairs[link], None  # as in the middle of a pass
    assert pair is not None
    sent = link.bytes_sent
    attention.proved(30)
    assert link.bytes_sent - sent > 8 * HIDDEN * 2
    pair.close()


def entry(meta: bytes) -> Message:
    return Message(Kind.PAIR_ENTRY, meta, memoryview(b""))


def test_who_waits_for_a_pair_is_let_go_with_its_link(workers: list[PairedWorker], attention: Attention) -> None:
    before = set(threading.enumerate())
    workers[0].signal(signal.SIGSTOP)
    try:
        attention.set_map(replicas=2)
        link = attention.links[NAMES[0]]
        attention.remote.hear(Received(link, entry(pack(["the first", b""]))))
        [joining] = [thread for thread in set(threading.enumerate()) - before if thread.name == f"pair-{NAMES[0]}"]
        link.close("a fault")
        attention.serve(lambda: link in attention.remote._pairs)
        joining.join(LONG_S / 2)
        assert not joining.is_alive()
        assert link not in attention.remote._stores
    finally:
        workers[0].signal(signal.SIGCONT)


def test_an_entry_that_cannot_be_read_ends_its_link_on_either_side(attention: Attention) -> None:
    attention.set_map(replicas=2)
    ours, theirs = attention.links.values()
    attention.remote.hear(Received(ours, entry(b"\xc1")))
    assert "expert-0 sent an entry that cannot be read" in str(ours.closed)
    theirs.send(Kind.PAIR_ENTRY, b"\xc1")
    attention.serve(lambda: not theirs.closed)
    assert str(theirs.closed).startswith("expert-1 is gone: ")  # what we read or what we wrote showed it first


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_silent_worker_is_given_up_at_its_deadline(
    workers: list[PairedWorker], attention: Attention, replicas: int
) -> None:
    attention.set_map(replicas)
    attention.join()
    workers[0].signal(signal.SIGSTOP)
    try:
        batch = attention.batch(64, LAYERS[0])
        handle = attention.experts.dispatch(*batch)
        attention.experts._send()
        assert handle.remote is not None
        for part in handle.remote.pending.values():
            part.expires = time.monotonic() + (0.3 if part.owner == 0 else LONG_S)
        rows, failed = attention.experts.collect(handle), attention.experts.take_failed()
    finally:
        workers[0].signal(signal.SIGCONT)
    expected = attention.expected(batch)
    assert "no reply" in str(attention.links[NAMES[0]].closed)
    kept = [row for row in range(64) if row not in failed]
    assert len(kept) == 64 if replicas == 2 else 0 < len(kept) < 64
    assert torch.equal(rows[kept], expected[kept])


def test_rows_that_were_told_of_and_do_not_come_are_asked_of_another(
    attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired_experts, "MIN_WAIT_S", 0.3)
    attention.set_map(replicas=2)
    attention.join()
    liar = attention.links[NAMES[0]]
    batch = attention.batch(64, LAYERS[0])
    handle = attention.experts.dispatch(*batch)
    attention.experts._send()
    assert handle.remote is not None
    number, part = next((number, part) for number, part in handle.remote.pending.items() if part.link is liar)
    pair = attention.remote._pairs[liar]
    assert pair is not None
    part.expires = 0.0
    pair.receive(torch.empty(len(part.slots), HIDDEN, dtype=torch.bfloat16)).wait(LONG_S)  # so that nothing follows
    told = Message(Kind.PAIRED_ROWS, ROWS.pack(number, len(part.slots), 0, 0, 0), memoryview(b""))
    attention.remote._on_event(Received(liar, told))
    assert "no answer" in str(liar.closed)
    assert torch.equal(attention.experts.collect(handle), attention.expected(batch))
    assert attention.experts.take_failed() == {}


def test_one_is_killed_in_the_middle_and_the_other_gives_the_same_bits(
    workers: list[PairedWorker], attention: Attention
) -> None:
    attention.set_map(replicas=2)
    attention.join()
    attention.proved()
    batches = [attention.batch(64, layer) for layer in LAYERS]
    workers[0].signal(signal.SIGSTOP)
    handles = [attention.experts.dispatch(*batch) for batch in batches]
    workers[0].end()
    for handle, batch in zip(handles, batches, strict=True):
        assert torch.equal(attention.experts.collect(handle), attention.expected(batch))
    assert attention.remote.counters.resent
    assert attention.remote.is_paired
    assert num_paired(attention) == 1
    attention.proved()
    attention.remote.close()
    workers[0] = PairedWorker(NAMES[0], held=(0, 1, 2))
    again = Attention(workers)
    again.set_map(replicas=2)  # says that it has all
    again.join()
    again.proved(40)
    assert again.remote.counters.resent
    assert num_paired(again) == 2
    again.remote.close()
    again.reactor.close()
