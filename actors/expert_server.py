"""Answers dispatches: whatever has arrived for a layer, from any attention worker, is computed as one batch.

No barrier and no lock-step (DESIGN law 2); decode before prefill, a few rows of which ride along.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from .direct_answers import DirectAnswers
from .dispatch import MAX_ANSWER_BYTES
from .expert_host import ExpertHost, Slice
from .links import Link, LinkClosed, LinkFull
from .messages import DISPATCH, ROWS, Kind
from .pairs import are_within, x_of
from .reactor import Event, Received
from .row_buffers import RowBuffers
from .wire import DTYPES, rows_from

log = logging.getLogger(__name__)

PREFILL_PATIENCE_S = 0.25  # far below the dispatch deadline, at which the asker would take us for dead
MOST_RIDERS = 64  # rows of prompts in a batch of decode rows: few enough that reading the weights is what takes time
MOST_OPEN = 256  # dispatches of one asker; one that keeps the rules has a few, one for each of its micro-batches
IDLE_S = 1.0


@dataclass(slots=True)  # not frozen: that would triple what it costs to make one
class Job:
    """One dispatch waiting to be computed."""

    link: Link
    number: int
    layer: int
    phase: int
    part: Slice
    arrived: float

    @property
    def rows(self) -> int:
        return self.part.x.shape[0]


class Queued(Protocol):
    """What waits to be computed, whatever way it came."""

    layer: int
    phase: int
    arrived: float

    @property
    def rows(self) -> int: ...


Q = TypeVar("Q", bound=Queued)


class Mail(Protocol):
    """Where dispatches come from; waits for the next one awake at first: its senders are in the middle of a step."""

    def poll(self, timeout_s: float) -> list[Event]: ...

    def spin(self, look: Callable[[int, int], Any]) -> Any: ...


class ExpertServer:
    def __init__(self, host: ExpertHost, hidden: int, num_experts: int, dtype: torch.dtype) -> None:
        self.counts: Counter[str] = Counter()
        self._host = host
        self._hidden, self._num_experts, self._dtype = hidden, num_experts, dtype
        self._row_bytes = hidden * dtype.itemsize
        self._buffers = RowBuffers()
        self._jobs: list[Job] = []
        self._direct = DirectAnswers(host, hidden, num_experts, dtype, self.counts)

    @property
    def has_jobs(self) -> bool:
        return bool(self._jobs)

    def serve(self, mail: Mail, is_stopping: Callable[[], bool]) -> None:
        while not is_stopping():
            if self._jobs or not self._direct.turn(mail):
                self.turn(mail.poll(0.0 if self._jobs else IDLE_S))

    def turn(self, events: list[Event]) -> None:
        """Takes in what has come, and computes the batch whose turn it is."""
        self._direct.note(events)
        self._jobs += jobs_of(events, self._hidden, self._num_experts, self._dtype)
        if len(self._jobs) > MOST_OPEN:
            self._jobs = bounded(self._jobs)
        if self._jobs:
            batch, self._jobs = next_batch(self._jobs, time.monotonic())
            self._compute(batch)

    def _compute(self, jobs: list[Job]) -> None:
        layer = jobs[0].layer
        num_rows, num_pairs, ready = self._resident(self._host, jobs)
        if not ready:
            return
        parts = [job.part for job in ready]
        started = time.monotonic()
        if len(ready) == 1 and (memory := ready[0].link.reserve(ROWS.size, num_pairs * self._row_bytes)) is not None:
            self._host.run(layer, parts, rows_from(memory, self._dtype, self._hidden))
            self._answer(ready[0], started, time.monotonic(), None)
        else:
            buffer, first = self._buffers.take(num_pairs, self._hidden, self._dtype), 0
            self._host.run(layer, parts, buffer.rows[:num_pairs])
            ended = time.monotonic()
            for job in ready:
                self._answer(job, started, ended, buffer.bytes_of_rows(first, job.part.num_pairs))
                first += job.part.num_pairs
            self._buffers.give_back(buffer)
        self._count(num_rows, num_pairs, len(ready))

    def _resident(self, host: ExpertHost, jobs: list[Job]) -> tuple[int, int, list[Job]]:
        """Puts the jobs of a batch together and refuses those of experts that are not here: rows, pairs, the others."""
        num_rows, num_pairs = 0, 0
        ready: list[Job] = []
        for job in jobs:
            if host.add(job.layer, job.part, num_rows, num_pairs):
                ready.append(job)
                num_rows, num_pairs = num_rows + job.part.x.shape[0], num_pairs + job.part.num_pairs
            else:
                self._refuse(job)
        return num_rows, num_pairs, ready

    def _count(self, num_rows: int, num_pairs: int, num_jobs: int) -> None:
        counts = self.counts
        counts["tokens"] += num_rows
        counts["rows"] += num_pairs
        counts["hops"] += num_jobs
        counts["batches"] += 1

    def _answer(self, job: Job, started: float, ended: float, rows: memoryview | None) -> None:
        """rows: None if they have been computed where the link wants them."""
        meta = rows_meta(job, started, ended)
        try:
            if rows is None:
                job.link.commit(Kind.ROWS, meta, job.part.num_pairs * self._row_bytes)
            else:
                job.link.send(Kind.ROWS, meta, rows)
        except (LinkClosed, LinkFull) as error:  # the asker is gone or does not read: its own deadline handles it
            log.warning("rows for %s dropped: %s", job.link.peer.name, error)

    def _refuse(self, job: Job) -> None:
        experts = self._host.missing(job.layer, job.part)
        log.warning("%s asked for experts %s of layer %d", job.link.peer.name, experts.tolist(), job.layer)
        with suppress(LinkClosed, LinkFull):
            job.link.send(Kind.NOT_RESIDENT, ROWS.pack(job.number, 0, 0, 0, 0), experts.data.cast("B"))


def rows_meta(job: Job, started: float, ended: float) -> bytes:
    """How an answer begins: whose it is, and how long it waited, was computed and was here."""
    queued, computed, held = started - job.arrived, ended - started, time.monotonic() - job.arrived
    return ROWS.pack(job.number, job.part.num_pairs, int(queued * 1e9), int(computed * 1e9), int(held * 1e9))


def next_batch(jobs: list[Q], now: float) -> tuple[list[Q], list[Q]]:
    """What is computed next, and the rest: decode before prefill (DESIGN section 5), then what has waited longest.

    All that there is for its layer is one batch, of prompts beside decode rows as many as cost these no time. A prefill
    job that has lost its patience counts as decode: busy decode workers must not starve it.
    """
    if len(jobs) == 1:
        return jobs, []
    head = min(jobs, key=lambda job: job.phase if now - job.arrived < PREFILL_PATIENCE_S else 0)
    batch, rest, room = list[Q](), list[Q](), MOST_RIDERS
    for job in jobs:
        is_rider = job.phase > head.phase
        if job.layer != head.layer or (is_rider and job.rows > room):
            rest.append(job)
        else:
            batch.append(job)
            room -= job.rows if is_rider else 0
    return batch, rest


def bounded(jobs: list[Job]) -> list[Job]:
    """Without those of peers that ask for more than is answered, who lose their links: what waits takes memory."""
    for link, count in Counter(job.link for job in jobs).items():
        if count > MOST_OPEN:
            link.close(f"{link.peer.name} has {count} dispatches open, more than {MOST_OPEN}")
    return [job for job in jobs if job.link.closed is None]


def jobs_of(events: list[Event], hidden: int, num_experts: int, dtype: torch.dtype) -> list[Job]:
    """The dispatches among the events; a peer whose dispatch makes no sense loses its link, nobody else anything."""
    jobs, now = [], time.monotonic()
    for event in events:
        if not isinstance(event, Received) or event.message.kind != Kind.DISPATCH:
            continue
        try:
            jobs.append(_job(event, hidden, num_experts, dtype, now))
        except (ValueError, KeyError, RuntimeError, struct.error) as error:
            log.warning("%s sent a dispatch that cannot be read: %s", event.link.peer.name, error)
            event.link.close(f"{event.link.peer.name} sent a dispatch that cannot be read: {error}")
    return jobs


def _job(event: Received, hidden: int, num_experts: int, dtype: torch.dtype, now: float) -> Job:
    number, _, layer, phase, code, num_rows, num_pairs = DISPATCH.unpack(event.message.meta)
    payload = event.message.payload
    are_sound = are_within(payload, num_pairs, num_rows, num_experts)
    x = x_of(payload, num_pairs, DTYPES[code], hidden)
    if x.shape[0] != num_rows or x.dtype != dtype:
        raise ValueError(f"{num_rows} rows of {dtype} announced or wanted, {x.shape[0]} of {x.dtype} sent")
    if not are_sound:
        raise ValueError(f"pairs beyond row {num_rows - 1} or expert {num_experts - 1}")
    most = MAX_ANSWER_BYTES // (hidden * dtype.itemsize)
    if not 0 < num_pairs <= max(most, 1):
        raise ValueError(f"{num_pairs} pairs where 1 to {most} have an answer")
    return Job(event.link, number, layer, phase, Slice(x, payload, num_pairs), now)
