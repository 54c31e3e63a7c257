"""Attention side of the expert hop: one message per expert worker and layer, per-slot rows back.

Law 4: an expert call is a pure function, so rows that a dead or silent worker still owes are sent again to another
replica from the inputs the handle holds. Law 2: only the rows of experts without a live replica fail; their tokens'
sequences get an error, every other row of the batch goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..router.expert_map import ExpertMap
from ..router.replica_bias import ReplicaBias
from .links import Link, LinkClosed, LinkFull, Message
from .messages import DISPATCH, ROWS, Kind
from .reactor import Closed, Event, Received
from .wire import DTYPE_CODES, bytes_of, rows_from

DISPATCH_DEADLINE_S = 30.0  # a prefill chunk on a busy CPU takes seconds; a hung worker must still be told apart
BIAS_INTERVAL = 16  # steps between two updates of the replica bias and its table

Ints = npt.NDArray[np.int64]


class Mail(Protocol):
    """Where replies come from; events that are not expert replies are kept for the engine."""

    def poll(self, timeout_s: float) -> list[Event]: ...

    def defer(self, event: Event) -> None: ...


@dataclass(slots=True)
class Part:
    """What one expert worker owes: the flat slots (row * k + slot) of one layer's dispatch."""

    owner: int
    link: Link
    slots: Ints
    expires: float


@dataclass(slots=True)
class RemoteHandle:
    """Returned by dispatch, consumed by collect: holds the inputs until every row is back."""

    layer: int
    x: Tensor
    topk_idx: Ints
    rows: Tensor
    pending: dict[int, Part] = field(default_factory=dict)


@dataclass(slots=True)
class Counters:
    hops: int = 0
    rows: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    resent: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0


class RemoteExperts:
    """The ExpertBackend of a disaggregated attention worker. Used by the engine thread only."""

    def __init__(self, mail: Mail, num_experts: int) -> None:
        self.mail = mail
        self.counters = Counters()
        self.epoch = 0
        self.phase = 0
        self.failed: dict[int, str] = {}
        self._num_experts = num_experts
        self._next_id = 1
        self._links: list[Link | None] = []
        self._names: list[str] = []
        self._layer_row: dict[int, int] = {}
        self._steps = 0
        self.loads: npt.NDArray[np.int64] = np.zeros((0, num_experts), dtype=np.int64)

    def set_map(self, expert_map: ExpertMap, links: Mapping[str, Link]) -> None:
        """Swaps to a published map. Between steps only: no handle is open then."""
        layers = sorted(expert_map.replicas)
        self.epoch = expert_map.epoch
        self._layer_row = {layer: row for row, layer in enumerate(layers)}
        self._names = [owner.worker for owner in expert_map.owners]
        lives = [(links.get(owner.worker), owner.incarnation) for owner in expert_map.owners]
        self._links = [link if link and link.peer.incarnation == life else None for link, life in lives]
        dead = [index for index, link in enumerate(self._links) if link is None or link.closed]
        self._bias = ReplicaBias(expert_map, layers, dead)
        self._table = self._bias.table()
        self._owner_rows = np.zeros(len(self._names))
        if len(self.loads) != len(layers):
            self.loads = np.zeros((len(layers), self._num_experts), dtype=np.int64)

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor) -> RemoteHandle:
        """x: [M, hidden]; topk_idx: [M, k]. Sends without waiting; the caller computes the shared expert meanwhile."""
        experts = topk_idx.numpy()
        rows = torch.empty(experts.size, x.shape[1], dtype=x.dtype)
        handle = RemoteHandle(layer, x.contiguous(), experts, rows)
        if layer not in self._layer_row:  # a front end can be faster than the first map
            self._fail(handle, np.arange(experts.size))
            return handle
        self.loads[self._layer_row[layer]] += np.bincount(experts.reshape(-1), minlength=self._num_experts)
        self._send(handle, np.arange(experts.size))
        return handle

    def collect(self, handle: RemoteHandle) -> Tensor:
        """Waits for every row, sending again what a lost worker owed. Returns [M, k, hidden]."""
        started = time.monotonic()
        while handle.pending:
            nearest = min(part.expires for part in handle.pending.values())
            events = deque(self.mail.poll(max(nearest - time.monotonic(), 0.0)))
            if not events:  # judged only when nothing is left to read: it may be us who slept
                self._give_up_overdue(handle)
            try:
                while events:
                    self._on_event(handle, events.popleft())
            finally:
                for event in events:
                    self.mail.defer(event)
        self.counters.wait_s += time.monotonic() - started
        return handle.rows.view(*handle.topk_idx.shape, -1)

    def _give_up_overdue(self, handle: RemoteHandle) -> None:
        now = time.monotonic()
        for part in [part for part in handle.pending.values() if part.expires <= now]:
            part.link.close(f"no reply for {DISPATCH_DEADLINE_S:.0f} s to a dispatch of layer {handle.layer}")
            self._lost(handle, part.link)

    def end_step(self) -> None:
        """Moves the replica bias by the load of the last steps (law 6)."""
        self._steps += 1
        if self._steps % BIAS_INTERVAL == 0 and self._names:
            self._bias.update(self._owner_rows)
            self._table = self._bias.table()
            self._owner_rows[:] = 0

    def take_failed(self) -> dict[int, str]:
        """Batch rows that lost an expert since the last call, each with the reason."""
        failed, self.failed = self.failed, {}
        return failed

    def _send(self, handle: RemoteHandle, slots: Ints) -> None:
        """slots: flat places (row * k + slot), ascending, that need a worker."""
        experts = handle.topk_idx.reshape(-1)[slots]
        owners = self._table[self._layer_row[handle.layer]][experts]
        for owner in np.unique(owners).tolist():
            mine = slots[owners == owner]
            if owner < 0:
                self._fail(handle, mine)
            else:
                self._send_part(handle, owner, mine)

    def _send_part(self, handle: RemoteHandle, owner: int, slots: Ints) -> None:
        top_k = handle.topk_idx.shape[1]
        rows, row_of_pair = np.unique(slots // top_k, return_inverse=True)
        x = handle.x if len(rows) == len(handle.x) else handle.x[torch.from_numpy(rows)]
        pairs = np.stack([row_of_pair, handle.topk_idx.reshape(-1)[slots]]).astype(np.int32)
        number, self._next_id = self._next_id, self._next_id + 1
        meta = DISPATCH.pack(number, self.epoch, handle.layer, self.phase, DTYPE_CODES[x.dtype], len(rows), len(slots))
        payload = bytes_of(x)
        link = self._links[owner]
        assert link is not None, f"the table chose {self._names[owner]}, which has no link"
        handle.pending[number] = Part(owner, link, slots, time.monotonic() + DISPATCH_DEADLINE_S)
        try:
            link.send(Kind.DISPATCH, meta, pairs.data.cast("B"), payload)
        except (LinkClosed, LinkFull):
            self._lost(handle, link)
            return
        self.counters.hops += 1
        self.counters.rows += len(slots)
        self.counters.bytes_out += payload.nbytes
        self._owner_rows[owner] += len(slots)

    def _on_event(self, handle: RemoteHandle, event: Event) -> None:
        if isinstance(event, Received) and event.message.kind == Kind.ROWS:
            self._on_rows(handle, event.message)
        elif isinstance(event, Received) and event.message.kind == Kind.NOT_RESIDENT:
            self._on_not_resident(handle, event.message)
        elif isinstance(event, Closed):
            self._lost(handle, event.link)
            self.mail.defer(event)
        else:
            self.mail.defer(event)

    def _on_rows(self, handle: RemoteHandle, message: Message) -> None:
        number, _, compute_ns = ROWS.unpack(message.meta)
        part = handle.pending.get(number)
        if part is None:
            return  # a late packet: its slice was sent again and answered by another replica
        expected = len(part.slots) * handle.x.shape[1] * handle.x.itemsize
        if message.payload.nbytes != expected:
            part.link.close(f"it sent {message.payload.nbytes} bytes of rows, {expected} were asked for")
            self._lost(handle, part.link)
            return
        del handle.pending[number]
        rows = rows_from(message.payload, handle.x.dtype, handle.x.shape[1])
        if len(part.slots) == len(handle.rows):
            handle.rows.copy_(rows)
        else:
            handle.rows[torch.from_numpy(part.slots)] = rows
        self.counters.compute_s += compute_ns / 1e9
        self.counters.bytes_in += message.payload.nbytes

    def _on_not_resident(self, handle: RemoteHandle, message: Message) -> None:
        """The map names a holder that does not hold: never ask it for these experts again."""
        part = handle.pending.pop(ROWS.unpack(message.meta)[0], None)
        if part is None:
            return
        experts = np.frombuffer(message.payload, dtype=np.int64)
        self._bias.forget(self._layer_row[handle.layer], experts, part.owner)
        self._table = self._bias.table()
        self.counters.resent += 1
        self._send(handle, part.slots)

    def _lost(self, handle: RemoteHandle, link: Link) -> None:
        """Takes a worker out of the table and sends what it owed to other replicas."""
        if link not in self._links:
            return
        owner = self._links.index(link)
        self._bias.drop(owner)
        self._table = self._bias.table()
        for number, part in list(handle.pending.items()):
            # a nested loss may have moved it already
            if part.owner == owner and handle.pending.pop(number, None) is not None:
                self.counters.resent += 1
                self._send(handle, part.slots)

    def _fail(self, handle: RemoteHandle, slots: Ints) -> None:
        top_k = handle.topk_idx.shape[1]
        handle.rows[torch.from_numpy(slots)] = 0.0
        for slot in slots.tolist():
            expert = int(handle.topk_idx.reshape(-1)[slot])
            self.failed[slot // top_k] = f"no live replica of expert {expert} of layer {handle.layer}"
