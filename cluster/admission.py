"""Who waits, who is placed where, and what this front end has reserved on which worker. Pure: time comes in as `now`.

Placement is in the queue's order (router/fair_queue.py): by priority, callers in turn, first come. A request that does
not fit yet keeps its place, and those behind it wait too.
The blocks reserved for a request are those it begins with. It grows on its worker, which preempts somebody when it has
no more: until then `free_blocks` of the reports tells of the growth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..actors.view import Role
from ..router.fair_queue import FairQueue
from ..router.placement import (
    DecodeCandidate,
    DecodeLedger,
    Placement,
    PrefillCandidate,
    blocks_at_first,
    place,
)
from ..router.prefix_keys import prefix_keys
from ..router.prefix_table import PrefixTable

BUSY_PAUSE_S = 0.05  # a worker that just said "busy" is not asked again before


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way. `order` is its arrival; `num_blocks` what it holds on its decode worker.

    `num_uncached`: what of the prompt its prefill worker probably has to compute.
    """

    order: int
    num_prompt: int
    max_tokens: int
    prompt: Sequence[int] = ()
    priority: int = 0
    caller: str = ""
    keys: list[bytes] | None = None
    placement: Placement | None = None
    num_blocks: int = 0
    num_uncached: int = 0
    is_prefilled: bool = False
    is_seen: bool = False
    is_back: bool = False

    @property
    def num_positions(self) -> int:
        """Those that its decode worker may come to hold."""
        return self.num_prompt + max(self.max_tokens - 1, 0)

    @property
    def needs_decode(self) -> bool:
        return self.max_tokens > 1  # the first token is the prefill worker's

    def depends_on(self, worker: str) -> bool:
        """Whether the worker's death ends the request: a prefill worker that is done no longer matters."""
        if self.placement is None:
            return False
        is_prefilling = self.placement.prefill == worker and not self.is_prefilled
        return is_prefilling or self.placement.decode == worker


@dataclass(slots=True)
class LinkedWorker:
    """`unprefilled_tokens` of prompts are on their way from us, `uncached_tokens` of which it must probably compute.

    `placed` counts the sequences that decode there, or will, and are ours: by priority.
    """

    name: str
    role: Role
    load: dict[str, Any] | None = None
    ledger: DecodeLedger = field(default_factory=DecodeLedger)
    placed: Counter[int] = field(default_factory=Counter)
    unprefilled_tokens: int = 0
    uncached_tokens: int = 0
    paused_until: float = 0.0

    @property
    def queued_tokens(self) -> int:
        """Ours, as far as it is not cached there; and what the report tells beyond ours is other front ends'."""
        reported = self.load["waiting_tokens"] if self.load else 0
        return self.uncached_tokens + max(reported - self.unprefilled_tokens, 0)

    def holds(self, num_positions: int) -> bool:
        return self.load is not None and num_positions <= self.load["total_blocks"] * self.load["block_size"]

    def has_place(self, priority: int) -> bool:
        """Whether it would take one more in now, whatever its blocks: else it says "busy" as often as it is asked.

        Those of worse priority give up their places. Where it computes the prompt too, there is a queue to wait in.
        """
        if self.load is None or self.role == "both":
            return self.load is not None
        others = max(self.load["sequences"] - self.placed.total(), 0)  # of other front ends
        ours = sum(count for other, count in self.placed.items() if other <= priority)
        return bool(others + ours < self.load["max_sequences"])


class Admission:
    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.workers: dict[str, LinkedWorker] = {}
        self.prefixes = PrefixTable()
        self._queue: FairQueue[Ticket] = FairQueue()

    @property
    def waiting(self) -> list[Ticket]:
        """In the order in which they will be placed if nobody joins."""
        return list(self._queue)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    # ---- workers

    def link(self, name: str, role: Role) -> None:
        self.workers[name] = LinkedWorker(name, role)

    def unlink(self, name: str) -> None:
        self.workers.pop(name, None)
        self.prefixes.forget(name)

    def report(self, load: dict[str, Any]) -> None:
        worker = self.workers.get(load["worker"])
        if worker is not None:
            worker.load = (worker.load or {}) | load  # counters come with some reports only
            worker.ledger.total_blocks = load["total_blocks"]
            worker.ledger.reported_free = load["free_blocks"]

    def pause(self, name: str, now: float) -> None:
        if name in self.workers:
            self.workers[name].paused_until = now + BUSY_PAUSE_S

    def of_role(self, *roles: Role) -> list[LinkedWorker]:
        """Linked workers that have told their load."""
        return [worker for worker in self.workers.values() if worker.role in roles and worker.load is not None]

    @property
    def is_ready(self) -> bool:
        return bool(self.of_role("prefill", "both") and self.of_role("decode", "both"))

    # ---- requests

    def why_never(self, ticket: Ticket) -> str | None:
        """Says why no linked worker could ever hold this request."""
        needs = [("prefill", ticket.num_prompt), ("decode", ticket.num_positions)]
        for role, positions in needs if ticket.needs_decode else needs[:1]:
            workers = self.of_role("both", "prefill" if role == "prefill" else "decode")
            if not any(worker.holds(positions) for worker in workers):
                room = max((w.load["total_blocks"] * w.load["block_size"] for w in workers if w.load), default=0)
                return (
                    f"the request needs KV cache for {positions} tokens, the largest {role} worker has room for {room}"
                )
        return None

    def join(self, ticket: Ticket, now: float) -> bool:
        """Places the ticket at once or lets it wait; False when the queue is full."""
        head = self._queue.peek()
        if (head is None or ticket.priority < head.priority) and self._place(ticket, now):
            return True
        if len(self._queue) >= self.max_waiting:
            return False
        self._queue.push(ticket, ticket.priority, ticket.caller)
        return True

    def crowded_out(self, ticket: Ticket) -> Ticket | None:
        """Who must leave a full queue for this one: of a worse priority, or of a caller who has more than its share."""
        return self._queue.crowding_out(ticket.caller, ticket.priority)

    def rejoin(self, ticket: Ticket) -> None:
        """Back to its old place in the queue, after a worker said "busy"."""
        self.release(ticket)
        ticket.is_back = True
        earlier = [
            other
            for other in self._queue
            if other.is_back and other.priority == ticket.priority and other.order < ticket.order
        ]
        for other in earlier:
            self._queue.remove(other)
        for one in [ticket, *sorted(earlier, key=lambda other: -other.order)]:
            self._queue.put_back(one, one.priority, one.caller)

    def place_waiting(self, now: float) -> list[Ticket]:
        """Takes as many tickets off the head of the queue as fit now."""
        placed: list[Ticket] = []
        while (head := self._queue.peek()) is not None and self._place(head, now):
            placed.append(self._queue.pop())
        return placed

    def note_token(self, ticket: Ticket, worker: str) -> None:
        """A token of the ticket came from this worker, together with a load report that knows of it.

        Only the prefill worker's own token says that it is done: the decode worker's may overtake it, or outlive it.
        """
        assert ticket.placement is not None, "a token for a request that is not placed"
        if worker == ticket.placement.prefill and not ticket.is_prefilled:
            ticket.is_prefilled = True
            self._count_prompt(ticket.placement.prefill, -ticket.num_prompt, -ticket.num_uncached)
        if worker == ticket.placement.decode and not ticket.is_seen:
            ticket.is_seen = True
            if worker in self.workers:
                self.workers[worker].ledger.see(ticket.num_blocks)

    def release(self, ticket: Ticket) -> None:
        """Takes the ticket out wherever it stands; a second time does nothing."""
        if ticket in self._queue:
            self._queue.remove(ticket)
        placement, ticket.placement = ticket.placement, None
        if placement is None:
            return
        if not ticket.is_prefilled:
            self._count_prompt(placement.prefill, -ticket.num_prompt, -ticket.num_uncached)
        if placement.decode in self.workers:
            self.workers[placement.decode].ledger.release(ticket.num_blocks, ticket.is_seen)
            self.workers[placement.decode].placed[ticket.priority] -= 1
        ticket.num_blocks, ticket.num_uncached, ticket.is_prefilled, ticket.is_seen = 0, 0, False, False

    def _place(self, ticket: Ticket, now: float) -> bool:
        awake = {
            name: worker.load for name, worker in self.workers.items() if worker.load and worker.paused_until <= now
        }
        if not awake:
            return False
        block_size = min(load["block_size"] for load in awake.values())
        if ticket.keys is None:
            ticket.keys = prefix_keys(ticket.prompt, block_size)
        num_blocks = blocks_at_first(ticket.num_prompt, ticket.max_tokens, block_size) if ticket.needs_decode else 0
        hits = {name: self.prefixes.hits(name, ticket.keys) for name in awake}
        cached = {name: self._cached_tokens(ticket, hits[name], block_size) for name in awake}
        prefill = [
            PrefillCandidate(name, worker.queued_tokens, cached[name])
            for name, worker in self.workers.items()
            if name in awake and worker.role in ("prefill", "both") and worker.holds(ticket.num_prompt)
        ]
        decode = [
            DecodeCandidate(name, worker.ledger.free_blocks, awake[name]["running"], hits[name])
            for name, worker in self.workers.items()
            if name in awake
            and worker.role in ("decode", "both")
            and worker.holds(ticket.num_positions)
            and worker.has_place(ticket.priority)
        ]
        ticket.placement = place(prefill, decode, ticket.num_prompt, num_blocks)
        if ticket.placement is not None:
            self._reserve(ticket, ticket.placement, num_blocks, ticket.num_prompt - cached[ticket.placement.prefill])
        return ticket.placement is not None

    def _reserve(self, ticket: Ticket, chosen: Placement, num_blocks: int, num_uncached: int) -> None:
        ticket.num_blocks, ticket.num_uncached = num_blocks, num_uncached
        self._count_prompt(chosen.prefill, ticket.num_prompt, num_uncached)
        self.workers[chosen.decode].ledger.reserve(num_blocks)
        self.workers[chosen.decode].placed[ticket.priority] += 1
        for name in {chosen.prefill, chosen.decode}:
            self.prefixes.note(name, ticket.keys or (), self.workers[name].ledger.total_blocks)

    @staticmethod
    def _cached_tokens(ticket: Ticket, num_blocks: int, block_size: int) -> int:
        """The last token of a prompt is always computed, and its block with it."""
        return min(num_blocks, (ticket.num_prompt - 1) // block_size) * block_size

    def _count_prompt(self, worker: str, num_tokens: int, num_uncached: int) -> None:
        if worker in self.workers:
            self.workers[worker].unprefilled_tokens += num_tokens
            self.workers[worker].uncached_tokens += num_uncached
