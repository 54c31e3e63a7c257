"""Expert side of the hop through shared device memory: doorbells in, kernels out, and never a wait for the GPU.

Whatever has arrived for a layer, from any attention worker, is one batch, decode before prefill, as over links. A
lonely post is computed from where it lies to where its asker looks; several are brought together and delivered.
Doorbells make no noise: while a pass is under way anywhere they are looked at again and again, at first awake, then
every millisecond; only when nobody says that he is busy does this side sleep on its links, on which he wakes it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.gpu import mail as kernels
from ..model.network_weights import ExpertWeights
from .expert_server import IDLE_S, ExpertServer, next_batch
from .links import Link, LinkClosed, LinkFull
from .mailbox import ASLEEP, BUSY, Box, accept
from .messages import Kind
from .reactor import Closed, Event, Received
from .remains import Remains
from .spin import SPIN_S

log = logging.getLogger(__name__)

LOOKS = 64  # at the doorbells between two at the links
NAP_S = 0.001


@dataclass(slots=True)
class MailJob:
    """One post that waits to be computed."""

    link: Link
    box: Box
    slot: int
    sequence: int
    layer: int
    phase: int
    rows: int
    arrived: float


@dataclass(slots=True)
class Asker:
    link: Link
    box: Box
    seen: list[int] = field(default_factory=list)  # of each slot, the last word of its doorbell


class Mail(Protocol):
    def poll(self, timeout_s: float, is_urgent: bool = True) -> list[Event]: ...


class DeviceServer:
    """Beside the server of those who come over links; both on the serving thread."""

    def __init__(
        self,
        server: ExpertServer,
        weights: Mapping[int, ExpertWeights],
        num_experts: int,
        hidden: int,
        top_k: int,
        device: torch.device,
    ) -> None:
        self._server = server
        self._weights = dict(weights)
        self._hidden, self._top_k = hidden, top_k
        self._device = device
        self._local = {layer: _places(held.expert_ids, num_experts, device) for layer, held in weights.items()}
        self._askers: dict[Link, Asker] = {}
        self._jobs: list[MailJob] = []
        self._remains = Remains()
        self._heard = 0.0
        self._fence = threading.Lock()
        self._x = self._rows = self._place_of_pair = self._row_of_pair = torch.empty(0)

    def serve(self, mail: Mail, is_stopping: Callable[[], bool]) -> None:
        while not is_stopping():
            patience_s = self._patience()
            events = mail.poll(patience_s, is_urgent=not self._askers)
            self._tell(ASLEEP, 0)
            self.turn(events)
        for asker in list(self._askers.values()):
            self._let_go(asker)
        self._remains.close()

    def turn(self, events: list[Event]) -> None:
        """Takes in what has come, and computes the batch whose turn it is."""
        for event in events:
            self._hear(event)
        self._server.turn(events)
        for _ in range(LOOKS):
            self._look()
            if self._jobs or time.monotonic() - self._heard > SPIN_S:
                break
            os.sched_yield()
        if self._jobs:
            batch, rest = next_batch(self._jobs, time.monotonic())
            self._jobs = batch[kernels.MAX_JOBS :] + rest
            self._compute(batch[: kernels.MAX_JOBS])

    def _patience(self) -> float:
        """Seconds that the next wait on the links may take."""
        if self._jobs or self._server.has_jobs or time.monotonic() - self._heard < SPIN_S:
            return 0.0
        if self._is_anyone_busy():
            return NAP_S
        self._tell(ASLEEP, 1)
        with self._fence:  # he looks at ASLEEP after he has set BUSY
            self._look()
        return 0.0 if self._jobs or self._is_anyone_busy() else IDLE_S

    def _tell(self, word: int, value: int) -> None:
        for asker in self._askers.values():
            asker.box.bells.words[word] = value

    def _is_anyone_busy(self) -> bool:
        return any(asker.box.bells.words[BUSY] for asker in self._askers.values())

    def _hear(self, event: Event) -> None:
        asker = self._askers.get(event.link)
        if isinstance(event, Closed) and asker is not None:
            self._jobs = [job for job in self._jobs if job.link is not event.link]
            self._let_go(asker)
        elif isinstance(event, Received) and event.message.kind == Kind.MAIL_OFFER and asker is None:
            self._accept(event.link, event.message.meta)

    def _accept(self, link: Link, meta: bytes) -> None:
        self._remains.free()
        try:
            box, answer = accept(meta, self._device)
            if (box.shape.hidden, box.shape.top_k) != (self._hidden, self._top_k):
                box.close()
                box.inbox.disown()
                raise ValueError(f"{box.shape} is not of this model: {self._hidden} wide, {self._top_k} experts a row")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            log.warning("no mailbox for %s: %s", link.peer.name, error)
            with suppress(LinkClosed, LinkFull):
                link.send(Kind.MAIL_REFUSED, str(error).encode())
            return
        self._askers[link] = Asker(link, box, [0] * box.shape.slots)
        with suppress(LinkClosed, LinkFull):  # Closed follows
            link.send(Kind.MAIL_ACCEPTED, answer)

    def _let_go(self, asker: Asker) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # what was launched may still write there
        del self._askers[asker.link]
        asker.box.close()
        self._remains.keep(asker.box.process, asker.box.inbox)

    def _look(self) -> None:
        now = time.monotonic()
        for asker in self._askers.values():
            words = asker.box.bells.words[: len(asker.seen)].tolist()
            if words != asker.seen:
                self._heard = now
                for slot, (word, seen) in enumerate(zip(words, asker.seen, strict=True)):
                    if word != seen:
                        sequence, phase, layer, rows = kernels.bell_of(word)
                        job = MailJob(asker.link, asker.box, slot, sequence, layer, phase, rows, now)
                        self._take(job)
                asker.seen = words

    def _take(self, job: MailJob) -> None:
        if not 1 <= job.rows <= job.box.shape.max_rows:
            job.link.close(f"{job.link.peer.name} rang for {job.rows} rows of {job.box.shape.max_rows}")
        elif job.layer not in self._weights:
            log.warning("%s asked for layer %d", job.link.peer.name, job.layer)
            kernels.signal(self._table([job], is_absent=True))
        else:
            self._jobs.append(job)

    def _compute(self, jobs: list[MailJob]) -> None:
        layer, top_k = jobs[0].layer, self._top_k
        held, table = self._weights[layer], self._table(jobs)
        num_rows = sum(job.rows for job in jobs)
        num_pairs = num_rows * top_k
        is_alone = len(jobs) == 1
        self._make_room(num_rows, is_alone)
        x = jobs[0].box.x(jobs[0].slot)[:num_rows] if is_alone else self._x[:num_rows]
        out = jobs[0].box.rows(jobs[0].slot)[:num_pairs] if is_alone else self._rows[:num_pairs]
        places = self._place_of_pair[:num_rows]
        kernels.take_in(table, self._local[layer], x, places, copies=not is_alone)
        held.ops.grouped_mlp(x, self._row_of_pair[:num_pairs], places.view(-1), held.w13, held.w2, out=out)
        if not is_alone:
            kernels.deliver(table, out, places)
        counts = self._server.counts  # before the askers go on: whoever has rows finds them counted
        counts["tokens"] += num_rows
        counts["hops"] += len(jobs)
        counts["batches"] += 1
        kernels.signal(table)

    def _table(self, jobs: list[MailJob], is_absent: bool = False) -> Tensor:
        rows, first = [], 0
        for job in jobs:
            box, slot = job.box, job.slot
            addresses = [box.x(slot).data_ptr(), box.ids_address(slot), box.rows(slot).data_ptr()]
            rows.append([*addresses, box.flag_address(slot), first, job.sequence, int(is_absent), 0])
            first += job.rows
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return table.to(self._device, non_blocking=True)

    def _make_room(self, num_rows: int, is_alone: bool) -> None:
        """Memory of a batch; in the order of the stream, so one batch's is the next one's."""
        device = self._device
        if len(self._place_of_pair) < num_rows:
            self._place_of_pair = torch.empty(2 * num_rows, self._top_k, dtype=torch.int64, device=device)
            self._row_of_pair = torch.arange(2 * num_rows, device=device).repeat_interleave(self._top_k)
        if not is_alone and len(self._x) < num_rows:
            self._x = torch.empty(2 * num_rows, self._hidden, dtype=torch.bfloat16, device=device)
            self._rows = torch.empty(2 * num_rows * self._top_k, self._hidden, dtype=torch.bfloat16, device=device)


def _places(expert_ids: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor:
    table = np.full(num_experts, -1, dtype=np.int32)
    table[list(expert_ids)] = np.arange(len(expert_ids))
    return torch.from_numpy(table).to(device)
