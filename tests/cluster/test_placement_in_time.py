"""Requests with shared prefixes over several workers, in virtual time: the workers compute, cache, evict and report."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from braid.cluster.admission import Admission, Ticket
from braid.router.prefix_keys import prefix_keys

RATE = 1000.0  # prompt tokens a second
BLOCK = 64


def load_of(worker: str, num_blocks: int, waiting_tokens: int = 0) -> dict[str, Any]:
    load = {"worker": worker, "free_blocks": num_blocks, "total_blocks": num_blocks, "block_size": BLOCK}
    load |= {"sequences": 0, "max_sequences": 1000, "running": 0, "waiting": 0, "counters": {}}
    return load | {"waiting_tokens": waiting_tokens}


@dataclass
class PrefillWorker:
    """First come, first served, with a prefix cache of its own."""

    name: str
    blocks: int
    kept_blocks: int
    busy_until: float = 0.0
    waiting: int = 0
    computed: int = 0
    cache: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def take(self, ticket: Ticket, now: float) -> float:
        """When the prompt will be done."""
        keys = prefix_keys(ticket.prompt, BLOCK)
        hits = next((place for place, key in enumerate(keys) if key not in self.cache), len(keys))
        work = ticket.num_prompt - min(hits, (ticket.num_prompt - 1) // BLOCK) * BLOCK
        for key in reversed(keys):
            self.cache[key] = None
            self.cache.move_to_end(key)
        while len(self.cache) > self.kept_blocks:
            self.cache.popitem(last=False)
        self.computed += work
        self.waiting += ticket.num_prompt
        self.busy_until = max(self.busy_until, now) + work / RATE
        return self.busy_until


class World:
    def __init__(self, num_prefill: int, blocks: int = 1000, kept_blocks: int = 0) -> None:
        self.now = 0.0
        self.admission = Admission(1000)
        self.prefill = {f"p{i}": PrefillWorker(f"p{i}", blocks, kept_blocks or blocks) for i in range(num_prefill)}
        self.served: Counter[str] = Counter()
        self.waits: list[float] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for name in self.prefill:
            self.admission.link(name, "prefill")
            self._report(name)
        self.admission.link("d", "decode")
        self.admission.report(load_of("d", 100_000))

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def ask(self, when: float, prompt: list[int]) -> None:
        self.at(when, lambda: self._ask(Ticket(next(self._order), len(prompt), 8, prompt)))

    def run(self) -> None:
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def _ask(self, ticket: Ticket) -> None:
        assert self.admission.join(ticket, self.now)
        assert ticket.placement is not None
        worker = self.prefill[ticket.placement.prefill]
        self.served[worker.name] += 1
        done = worker.take(ticket, self.now)
        self.waits.append(done - self.now)
        self.at(done, lambda: self._done(worker, ticket))

    def _done(self, worker: PrefillWorker, ticket: Ticket) -> None:
        worker.waiting -= ticket.num_prompt
        self._report(worker.name)
        self.admission.note_token(ticket, worker.name)
        self.admission.release(ticket)

    def _report(self, name: str) -> None:
        worker = self.prefill[name]
        self.admission.report(load_of(name, worker.blocks, worker.waiting))


def prompt(session: int, num_tokens: int) -> list[int]:
    return [session * 100_003 + place for place in range(num_tokens)]


def test_sessions_stick_to_the_worker_that_holds_them() -> None:
    world = World(4)
    for turn in range(10):
        for session in range(12):  # every turn goes on from the last one, after a pause
            world.ask(20.0 * turn + 0.7 * session, prompt(session, 300 + 200 * turn))
    world.run()
    total = sum(worker.computed for worker in world.prefill.values())
    needed = 12 * (300 + 9 * (200 + BLOCK))
    assert total <= needed, "a session was computed twice"
    assert max(world.served.values()) <= 2 * min(world.served.values())


def test_a_hot_prefix_spreads_when_its_worker_is_too_busy() -> None:
    """Everybody shares 2,048 tokens and brings 64 more: twice what one worker can compute."""
    world = World(4)
    shared = prompt(1, 2048)
    for number in range(600):
        world.ask(number * 64 / (2 * RATE), shared + prompt(1000 + number, 64))
    world.run()
    assert len(world.served) >= 2
    assert max(world.served.values()) < 450
    assert max(world.waits[100:]) < 4.5, "longer than the prefix costs elsewhere, and its own queue"
    assert sum(worker.computed for worker in world.prefill.values()) < 600 * 64 * 2 + 4 * 2112


def test_a_wrong_guess_costs_time_and_nothing_else() -> None:
    """The worker's cache is much smaller than the table believes: everything is still computed and accounted for."""
    world = World(2, blocks=40, kept_blocks=8)
    for turn in range(6):
        for session in range(6):
            world.ask(10.0 * turn + session, prompt(session, 1000))
    world.run()
    assert sum(world.served.values()) == 36
    for linked in world.admission.workers.values():
        assert (linked.unprefilled_tokens, linked.uncached_tokens, linked.ledger.reserved) == (0, 0, 0)


def test_what_a_dead_worker_held_is_forgotten() -> None:
    world = World(2)
    for number in range(8):
        world.ask(10.0 * number, prompt(7, 500 + number))
    world.run()
    [(home, _)] = world.served.items()
    world.admission.unlink(home)
    world.served.clear()
    world.ask(100.0, prompt(7, 600))
    world.run()
    [(other, _)] = world.served.items()
    assert other != home
    world.prefill[home] = PrefillWorker(home, 1000, 1000)  # its next life, with an empty cache
    world.admission.link(home, "prefill")
    world.admission.report(load_of(home, 1000))
    world.ask(200.0, prompt(7, 600))
    world.run()
    assert world.served == {other: 2}
