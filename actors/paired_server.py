"""Expert side of pairs: rows of other hosts' devices come, are computed and leave without touching host memory.

Each pair has a thread, which joins it, then receives and sends in the order of the link's messages; so a silent asker
holds up nobody else. Whatever has arrived for a layer is one batch, decode before prefill, as over links.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from ..model.from_device import Aside, recorded
from ..model.network_weights import ExpertWeights
from ..model.to_device import on_device
from .dispatch import DISPATCH_DEADLINE_S
from .expert_host import ExpertHost, Slice
from .expert_server import ExpertServer, Job, next_batch, rows_meta
from .links import DialFailed, Link, LinkClosed, LinkError, LinkFull
from .messages import DISPATCH, Kind
from .nccl_pair import EXPERT, RowPair, join
from .pair_store import PairStore
from .paired_experts import JOIN_TIMEOUT_S
from .pairs import are_within
from .reactor import Closed, Event, Received
from .staging import StagedHost
from .wire import DTYPES

log = logging.getLogger(__name__)

Item = tuple[Job | Tensor, torch.cuda.Event | None]  # to be received or to be sent; the memory, or the rows, are ready


@dataclass(slots=True)
class Asker:
    link: Link
    store: PairStore
    items: SimpleQueue[Item | None] = field(default_factory=SimpleQueue)  # None: the link is closed
    pair: RowPair | None = None  # once both ends are there


class DeviceHost(ExpertHost):
    """ExpertHost for slices and rows that are where the weights are."""

    def compute(self, layer: int, x: Tensor, rows: Tensor, places: Tensor, out: Tensor) -> None:
        super().compute(layer, x, on_device(rows, x.device), on_device(places, x.device), out)


class PairedServer(ExpertServer):
    """ExpertServer of a device. `address`: of this machine, for pairs. `wake` (any thread) ends a wait for events."""

    def __init__(
        self,
        weights: Mapping[int, ExpertWeights],
        hidden: int,
        num_experts: int,
        dtype: torch.dtype,
        device: torch.device,
        address: str,
        wake: Callable[[], None],
    ) -> None:
        super().__init__(StagedHost(weights, num_experts), hidden, num_experts, dtype)
        self._device_host = DeviceHost(weights, num_experts)
        self._device, self._address, self._wake = device, address, wake
        self._askers: dict[Link, Asker] = {}
        self._arrived: SimpleQueue[Job] = SimpleQueue()
        self._paired: list[Job] = []

    @property
    def has_jobs(self) -> bool:
        return super().has_jobs or bool(self._paired) or not self._arrived.empty()

    def turn(self, events: list[Event]) -> None:
        for event in events:
            self._hear(event)
        super().turn(events)
        while not self._arrived.empty():
            self._paired.append(self._arrived.get())
        self._paired = [job for job in self._paired if job.link in self._askers]
        if self._paired:
            batch, self._paired = next_batch(self._paired, time.monotonic())
            self._compute_paired(batch)

    def _hear(self, event: Event) -> None:
        asker = self._askers.get(event.link)
        if isinstance(event, Closed) and asker is not None:
            del self._askers[event.link]
            asker.items.put(None)
            asker.store.close("its link is closed")
            if asker.pair is not None:
                asker.pair.close("its link is closed")
        elif isinstance(event, Received) and event.message.kind == Kind.PAIR_ASK and asker is None:
            self._begin(event.link)
        elif isinstance(event, Received) and event.message.kind == Kind.PAIR_ENTRY and asker is not None:
            try:
                asker.store.hear(event.message.meta)
            except ValueError as error:
                event.link.close(f"{event.link.peer.name} sent an entry that cannot be read: {error}")
        elif isinstance(event, Received) and event.message.kind == Kind.PAIRED_DISPATCH:
            try:
                self._take(event, asker)
            except (ValueError, KeyError, struct.error) as error:
                event.link.close(f"{event.link.peer.name} sent a dispatch that cannot be read: {error}")

    def _begin(self, link: Link) -> None:
        store = PairStore(link.peer.name, lambda meta: link.send(Kind.PAIR_ENTRY, meta), JOIN_TIMEOUT_S)
        asker = self._askers[link] = Asker(link, store)
        threading.Thread(target=self._exchange, args=(asker,), name=f"pair-{link.peer.name}", daemon=True).start()

    def _take(self, event: Received, asker: Asker | None) -> None:
        number, _, layer, phase, code, num_rows, num_pairs = DISPATCH.unpack(event.message.meta)
        payload = event.message.payload
        are_sound = are_within(payload, num_pairs, num_rows, self._num_experts)
        if asker is None or DTYPES[code] != self._dtype or not 0 < num_rows <= num_pairs or not are_sound:
            raise ValueError(f"{num_rows} rows of {DTYPES[code]} for {num_pairs} pairs, {self._dtype} wanted")
        x = torch.empty(num_rows, self._hidden, dtype=self._dtype, device=self._device)
        job = Job(event.link, number, layer, phase, Slice(x, payload, num_pairs), time.monotonic())
        asker.items.put((job, recorded(self._device)))

    def _exchange(self, asker: Asker) -> None:
        """The life of a pair, on its own thread."""
        name = asker.link.peer.name
        try:
            with torch.inference_mode():
                pair = join(name, EXPERT, asker.store, self._address, self._device, JOIN_TIMEOUT_S)
                asker.pair, aside = pair, Aside(self._device)  # batches launched meanwhile are not waited for
                while (item := asker.items.get()) is not None:
                    subject, event = item
                    with aside.after(event):
                        if isinstance(subject, Tensor):
                            pair.send(subject).wait(DISPATCH_DEADLINE_S)
                            continue
                        pair.receive(subject.part.x).wait(DISPATCH_DEADLINE_S)
                    self._arrived.put(subject)
                    self._wake()
        except DialFailed as error:
            log.warning("rows of %s go through host memory: %s", asker.link.peer.name, error)
            if asker.items.get() is not None:
                asker.link.close(f"{asker.link.peer.name} sent rows through a pair that is not there")
        except LinkError as error:
            asker.link.close(str(error))
        finally:
            if asker.pair is not None:
                asker.pair.close("its link is closed")

    def _compute_paired(self, jobs: list[Job]) -> None:
        host = self._device_host
        num_rows, num_pairs, ready = self._resident(host, jobs)
        if not ready:
            return
        started, first = time.monotonic(), 0
        rows = torch.empty(num_pairs, self._hidden, dtype=self._dtype, device=self._device)
        host.run(jobs[0].layer, [job.part for job in ready], rows)
        ended, computed = time.monotonic(), recorded(self._device)
        for job in ready:
            self._answer_paired(job, started, ended, (rows[first : first + job.part.num_pairs], computed))
            first += job.part.num_pairs
        self._count(num_rows, num_pairs, len(ready))

    def _answer_paired(self, job: Job, started: float, ended: float, rows: Item) -> None:
        """The times are the host's, which waits for nothing."""
        meta = rows_meta(job, started, ended)
        try:
            job.link.send(Kind.PAIRED_ROWS, meta)
        except (LinkClosed, LinkFull) as error:
            log.warning("rows for %s dropped: %s", job.link.peer.name, error)
        else:
            self._askers[job.link].items.put(rows)
