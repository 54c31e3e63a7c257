"""Answers dispatches: whatever has arrived for a layer, from any attention worker, is computed as one batch.

No barrier and no lock-step (DESIGN law 2); decode before prefill.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .expert_host import ExpertHost, NotResident, Slice
from .links import Link, LinkClosed, LinkFull
from .messages import DISPATCH, ROWS, Kind
from .reactor import Event, Received
from .row_buffers import RowBuffers
from .wire import DTYPES, bytes_of, rows_from

log = logging.getLogger(__name__)

PREFILL_PATIENCE_S = 0.25  # far below the dispatch deadline, at which the asker would take us for dead
IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """One dispatch waiting to be computed."""

    link: Link
    number: int
    layer: int
    phase: int
    part: Slice
    arrived: float


class Mail(Protocol):
    """Where dispatches come from; waits for the next one awake at first: its senders are in the middle of a step."""

    def poll(self, timeout_s: float) -> list[Event]: ...


class ExpertServer:
    def __init__(self, host: ExpertHost, hidden: int, num_experts: int, dtype: torch.dtype) -> None:
        self.counts: Counter[str] = Counter()
        self._host = host
        self._hidden, self._num_experts, self._dtype = hidden, num_experts, dtype
        self._buffers = RowBuffers()

    def serve(self, mail: Mail, is_stopping: Callable[[], bool]) -> None:
        jobs: list[Job] = []
        while not is_stopping():
            events = mail.poll(0.0 if jobs else IDLE_S)
            jobs += jobs_of(events, self._hidden, self._num_experts, self._dtype)
            if jobs:
                batch, jobs = next_batch(jobs, time.monotonic())
                self._compute(batch)

    def _compute(self, jobs: list[Job]) -> None:
        layer, ready = jobs[0].layer, []
        for job in jobs:
            try:
                ready.append((job, self._host.local_experts(layer, job.part)))
            except NotResident as error:
                log.warning("%s asked for what is not here: %s", job.link.peer.name, error)
                self._reply(job, Kind.NOT_RESIDENT, ROWS.pack(job.number, 0, 0, 0, 0), bytes_of(error.experts))
        if not ready:
            return
        num_rows = sum(len(local) for _, local in ready)
        buffer = self._buffers.take(num_rows, self._hidden, self._dtype)
        started = time.monotonic()
        self._host.run(layer, [(job.part, local) for job, local in ready], buffer.rows[:num_rows])
        ended, first = time.monotonic(), 0
        for job, local in ready:
            queued, computed, held = started - job.arrived, ended - started, time.monotonic() - job.arrived
            meta = ROWS.pack(job.number, len(local), int(queued * 1e9), int(computed * 1e9), int(held * 1e9))
            self._reply(job, Kind.ROWS, meta, buffer.bytes_of_rows(first, len(local)))
            first += len(local)
            self.counts["tokens"] += len(job.part.x)
        self._buffers.give_back(buffer)
        self.counts["rows"] += num_rows
        self.counts["hops"] += len(ready)
        self.counts["batches"] += 1

    def _reply(self, job: Job, kind: Kind, meta: bytes, payload: memoryview) -> None:
        try:
            job.link.send(kind, meta, payload)
        except (LinkClosed, LinkFull) as error:  # the asker is gone or does not read: its own deadline handles it
            log.warning("reply to %s dropped: %s", job.link.peer.name, error)


def next_batch(jobs: list[Job], now: float) -> tuple[list[Job], list[Job]]:
    """What is computed next, and the rest: decode before prefill (DESIGN section 5), then what has waited longest.

    A prefill job that has lost its patience counts as decode: busy decode workers must not starve it.
    """
    if len(jobs) == 1:
        return jobs, []
    head = min(jobs, key=lambda job: job.phase if now - job.arrived < PREFILL_PATIENCE_S else 0)
    batch = [job for job in jobs if job.layer == head.layer and job.phase == head.phase]
    return batch, [job for job in jobs if job.layer != head.layer or job.phase != head.phase]


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
    pairs = np.frombuffer(payload, dtype=np.uint32, count=2 * num_pairs).reshape(2, num_pairs)
    x = rows_from(payload[8 * num_pairs :], DTYPES[code], hidden)
    if len(x) != num_rows or x.dtype != dtype:
        raise ValueError(f"{num_rows} rows of {dtype} announced or wanted, {len(x)} of {x.dtype} sent")
    if num_pairs and (pairs[0].max() >= num_rows or pairs[1].max() >= num_experts):
        raise ValueError(f"pairs up to row {pairs[0].max()} and expert {pairs[1].max()} of {num_experts}")
    row_of_pair, expert_of_pair = torch.from_numpy(pairs.astype(np.int64))
    return Job(event.link, number, layer, phase, Slice(x, row_of_pair, expert_of_pair), now)
