"""An expert worker: a stateless process that answers whatever rows have arrived, from any attention worker.

No barrier and no lock-step (DESIGN law 2): what waits for a layer is computed as one batch, decode before prefill.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..model.checkpoint import Checkpoint
from ..model.config import ModelConfig
from ..model.ops import ops_for
from ..model.self_test import self_test
from ..model.weights import load_experts
from .endpoint import Endpoint
from .expert_host import ExpertHost, NotResident, Slice
from .links import Link, LinkClosed, LinkFull
from .loading import Loading, memory_checked, resolve_dtype
from .messages import DISPATCH, ROWS, Kind
from .reactor import Event, Received
from .settings import WorkerSettings
from .view import ClusterView, WorkerInfo
from .wire import DTYPES, bytes_of, rows_from

log = logging.getLogger(__name__)


PREFILL_PATIENCE_S = 0.25  # far below the dispatch deadline, at which the asker would take us for dead


@dataclass(frozen=True, slots=True)
class Job:
    """One dispatch waiting to be computed."""

    link: Link
    number: int
    layer: int
    phase: int
    part: Slice
    arrived: float


class ExpertWorker:
    """Plain class; `prepare` loads and serves, the other methods answer the controller from other threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.loading = Loading()
        self.endpoint: Endpoint | None = None
        self.counts: Counter[str] = Counter()

    def prepare(self) -> WorkerInfo:
        """Loads only this worker's routed experts, then serves.

        Raises CheckpointError, ValueError (memory) and SelfTestError.
        """
        self.config = config = ModelConfig.from_path(self.settings.model_path)
        assert config.n_routed_experts, f"{self.settings.model_path} has no routed experts: no expert worker is needed"
        experts = self.settings.expert_ids or tuple(range(config.n_routed_experts))
        self.dtype = dtype = resolve_dtype(self.settings.dtype, config)
        self._ops = ops = ops_for(dtype)
        ops.set_threads(self.settings.num_threads, self.settings.max_threads)
        memory_checked(config, dtype, "expert", experts)
        checkpoint = Checkpoint(self.settings.model_path)
        with torch.inference_mode():
            layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
            weights = load_experts(checkpoint, config, layers, experts, dtype, self.loading.progress, ops=ops)
        self.loading.phase = "self-test"
        self_test(config, dtype, ops, "experts")
        self.host = ExpertHost(weights, config.n_routed_experts)
        self.endpoint = Endpoint(self.settings)
        self.endpoint.start(self._serve)
        self.loading.phase = "ready"
        return replace(self.endpoint.info, kernels=ops.family)

    def progress(self) -> dict[str, Any]:
        return self.loading.report()

    def apply(self, view: ClusterView) -> None:
        """Expert workers dial nobody; they drop the links of lives that left the cluster."""
        assert self.endpoint is not None, "apply before prepare"
        self.endpoint.apply(view, [])

    def status(self) -> dict[str, Any]:
        if self.endpoint:
            self.endpoint.check()
        links = self.endpoint.describe_links() if self.endpoint else []
        return {"name": self.settings.name, "role": "expert", "pid": os.getpid(), "links": links, **self.counts}

    def stop(self) -> None:
        if self.endpoint:
            self.endpoint.stop()

    def _serve(self) -> None:
        assert self.endpoint is not None
        endpoint = self.endpoint
        self._ops.set_threads(self.settings.num_threads, self.settings.max_threads)
        with torch.inference_mode():
            while not endpoint.stopping:
                jobs = self._jobs(endpoint.poll(1.0))
                while jobs and not endpoint.stopping:
                    batch, jobs = next_batch(jobs, time.monotonic())
                    self._compute(batch[0].layer, batch)
                    jobs += self._jobs(endpoint.poll(0.0))

    def _jobs(self, events: list[Event]) -> list[Job]:
        return jobs_of(events, self.config.hidden_size, self.config.n_routed_experts or 0, self.dtype)

    def _compute(self, layer: int, jobs: list[Job]) -> None:
        started = time.perf_counter_ns()
        ready = []
        for job in jobs:
            try:
                ready.append((job, self.host.local_experts(layer, job.part)))
            except NotResident as error:
                log.warning("%s asked for what is not here: %s", job.link.peer.name, error)
                self._reply(job, Kind.NOT_RESIDENT, ROWS.pack(job.number, 0, 0, 0, 0), bytes_of(error.experts))
        if not ready:
            return
        answers = self.host.run(layer, [(job.part, local) for job, local in ready])
        elapsed = time.perf_counter_ns() - started
        for (job, local), rows in zip(ready, answers, strict=True):
            self._reply(job, Kind.ROWS, ROWS.pack(job.number, len(local), 0, elapsed, elapsed), bytes_of(rows))
            self.counts["tokens"] += len(job.part.x)
            self.counts["rows"] += len(local)
        self.counts["hops"] += len(ready)
        self.counts["batches"] += 1

    def _reply(self, job: Job, kind: Kind, meta: bytes, *payload: memoryview) -> None:
        try:
            job.link.send(kind, meta, *payload)
        except (LinkClosed, LinkFull) as error:  # the asker is gone or does not read: its own deadline handles it
            log.warning("reply to %s dropped: %s", job.link.peer.name, error)


def next_batch(jobs: list[Job], now: float) -> tuple[list[Job], list[Job]]:
    """What is computed next, and the rest: decode before prefill (DESIGN section 5), then what has waited longest.

    A prefill job that has lost its patience counts as decode: busy decode workers must not starve it.
    """
    head = min(jobs, key=lambda job: job.phase if now - job.arrived < PREFILL_PATIENCE_S else 0)
    batch = [job for job in jobs if job.layer == head.layer and job.phase == head.phase]
    return batch, [job for job in jobs if job.layer != head.layer or job.phase != head.phase]


def jobs_of(events: list[Event], hidden: int, num_experts: int, dtype: torch.dtype) -> list[Job]:
    """The dispatches among the events; a peer whose dispatch makes no sense loses its link, nobody else anything."""
    jobs = []
    for event in events:
        if not isinstance(event, Received) or event.message.kind != Kind.DISPATCH:
            continue
        try:
            jobs.append(_job(event, hidden, num_experts, dtype))
        except (ValueError, KeyError, RuntimeError, struct.error) as error:
            log.warning("%s sent a dispatch that cannot be read: %s", event.link.peer.name, error)
            event.link.close(f"{event.link.peer.name} sent a dispatch that cannot be read: {error}")
    return jobs


def _job(event: Received, hidden: int, num_experts: int, dtype: torch.dtype) -> Job:
    number, _, layer, phase, code, num_rows, num_pairs = DISPATCH.unpack(event.message.meta)
    payload = event.message.payload
    pairs = np.frombuffer(payload[: 8 * num_pairs], dtype=np.int32).reshape(2, num_pairs).astype(np.int64)
    x = rows_from(payload[8 * num_pairs :], DTYPES[code], hidden)
    if len(x) != num_rows or x.dtype != dtype:
        raise ValueError(f"{num_rows} rows of {dtype} announced or wanted, {len(x)} of {x.dtype} sent")
    if num_pairs and (pairs.min() < 0 or pairs[0].max() >= num_rows or pairs[1].max() >= num_experts):
        raise ValueError(f"pairs up to row {pairs[0].max()} and expert {pairs[1].max()} of {num_experts}")
    part = Slice(x, torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1]))
    return Job(event.link, number, layer, phase, part, time.monotonic())
