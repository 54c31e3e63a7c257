"""Attention side of the expert hop: one message per expert worker and layer, per-slot rows back.

Law 4: an expert call is a pure function, so rows that a dead or silent worker still owes are sent again to another
replica from the inputs the handle holds. Law 2: only the rows of experts without a live replica fail; their tokens'
sequences get an error, every other row of the batch goes on.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..router.expert_map import ExpertMap
from .direct_rows import DirectRows
from .dispatch_message import DispatchMessages
from .hops import Counters, Part, RemoteHandle
from .links import Link, LinkClosed, LinkFull, Message
from .messages import ROWS, Kind
from .owners import Owners, nobody
from .pairs import Ints, split
from .reactor import Closed, Event, Received
from .row_buffers import RowBuffers
from .shm_pipe import HAS_NATIVE
from .wire import rows_from

DISPATCH_DEADLINE_S = 30.0  # a prefill chunk on a busy CPU takes seconds; a hung worker must still be told apart
MAX_ANSWER_BYTES = 64 << 20  # of rows in one message: several must fit what a link may queue
BIAS_INTERVAL = 16  # steps between two updates of the replica bias
NUMBER = struct.Struct("<Q")  # how the meta of ROWS begins


def _nothing() -> None:
    pass


class Mail(Protocol):
    """Where replies come from; events that are not expert replies are kept for the engine."""

    def poll(self, timeout_s: float) -> list[Event]: ...

    def spin(self, look: Callable[[int, int], Any]) -> Any: ...

    def defer(self, event: Event) -> None: ...


class RemoteExperts:
    """The ExpertBackend of a disaggregated attention worker. Used by the engine thread only.

    `while_waiting` is called when rows are away: what need not be done before they leave is done there.
    """

    has_waits = True
    may_redo = False  # a slice is sent again, not the pass
    is_whole = True
    can_be_noted = False
    is_paired = False  # whether rows of x may stay on the device

    def __init__(self, mail: Mail, num_experts: int) -> None:
        self.while_waiting: Callable[[], None] = _nothing
        self.mail = mail
        self.counters = Counters()
        self.epoch = 0
        self.phase = 0
        self.failed: dict[int, str] = {}  # batch rows, each with the reason
        self.loads: npt.NDArray[np.int64] = np.zeros((0, num_experts), dtype=np.int64)  # pairs sent, [layers, experts]
        self._num_experts = num_experts
        self._next_id = 1
        self._owners = nobody(num_experts)
        self._direct: DirectRows | None = None
        self._steps = 0
        self._open: dict[int, Part] = {}  # by number
        self._buffers = RowBuffers()
        self._lent: list[RemoteHandle] = []  # whose rows collect has returned since the last dispatch
        self._slots = np.zeros(0, dtype=np.int64)  # 0, 1, 2 .. as far as was needed
        self._messages = DispatchMessages()
        self._collecting_since = 0.0

    # ---- what the model asks for

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor, first_row: int = 0) -> RemoteHandle:
        """x: [M, hidden]; topk_idx: [M, k]. Sends without waiting; the caller computes the shared expert meanwhile.

        x is read again if a worker is lost: leave it alone until collect. `first_row`: the place of x[0] in the batch.
        """
        started = time.monotonic()
        self._take_back()
        experts, top_k = topk_idx.numpy().reshape(-1), topk_idx.shape[1]
        handle = self._form_of_handle(x)(layer, x.contiguous(), experts, top_k, first_row)
        row = self._owners.row_of_layer.get(layer)
        if row is None:  # a request that came before the first map
            self._fail(handle, self._all_slots(len(handle.experts)))
        elif self._direct is not None:
            self.counters.serialise_s += self._send_direct(self._direct, handle, row) - started
        else:
            self._send(handle, self._all_slots(len(handle.experts)))
            self.counters.serialise_s += time.monotonic() - started
            self.loads[row] += np.bincount(handle.experts, minlength=self._num_experts)
        return handle

    def collect(self, handle: RemoteHandle) -> Tensor:
        """Waits for every row, sending again what a lost worker owed. Returns [M, k, hidden], valid until a dispatch.

        Rows of other open handles that come meanwhile are taken in too.
        """
        self._collecting_since = started = time.monotonic()
        if handle.pending:
            self.while_waiting()
        while handle.pending:
            if self._direct is not None and (arrival := self._direct.take(self.mail, self._open)) is not None:
                self._note_rows(*arrival)
            else:
                self._read_mail(handle)
        self._lent.append(handle)
        self.counters.wait_s += time.monotonic() - started
        if handle.whole is not None:
            return handle.whole
        rows = handle.gathered(self._buffers).rows[: len(handle.experts)]
        return rows.view(-1, handle.top_k, rows.shape[1])

    # ---- what the engine asks for

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for rows so far."""
        return self.counters.wait_s

    def is_settled(self) -> bool:
        return True

    def end_step(self) -> None:
        """Moves the replica bias by the load of the last steps (law 6)."""
        self._steps += 1
        if self._steps % BIAS_INTERVAL == 0:
            self._owners.balance()

    def take_failed(self) -> dict[int, str]:
        """Batch rows that lost an expert since the last call, each with the reason. Ends a step: no handle is open."""
        failed, self.failed = self.failed, {}
        self._take_back()
        for part in self._open.values():  # of a step that broke off
            part.handle.pending.clear()
        self._open.clear()
        return failed

    def set_map(self, expert_map: ExpertMap, links: Mapping[str, Link]) -> None:
        """Swaps to a published map. Between steps only: no handle is open then."""
        self.epoch = expert_map.epoch
        self._owners = owners = Owners(expert_map, links)
        for link in owners.links:
            if link is not None:
                link.hold_payloads(Kind.ROWS)
        self._direct = DirectRows(owners.links, self._buffers) if HAS_NATIVE else None
        if len(self.loads) != len(owners.row_of_layer):
            self.loads = np.zeros((len(owners.row_of_layer), self._num_experts), dtype=np.int64)

    # ---- what leaves

    def _form_of_handle(self, x: Tensor) -> type[RemoteHandle]:
        return RemoteHandle

    def _send_direct(self, direct: DirectRows, handle: RemoteHandle, row: int) -> float:
        """Into rings what goes there at once, then the rest by messages. Returns when the last of it was sent."""
        owners, loads, number = self._owners, self.loads[row], self._next_id
        order, parts = direct.send(handle, owners.table[row], loads, number, self.epoch, self.phase)
        unsent, last = [], 0.0
        for owner, first, num, num_bytes, sent in parts:
            slots, link = order[first : first + num], owners.links[owner]
            if num_bytes < 0:
                unsent.append((owner, slots))
                continue
            assert link is not None, "what has no link has no ring"
            link.has_sent(num_bytes)
            part = Part(handle, owner, link, slots, sent + DISPATCH_DEADLINE_S, sent)
            self._open[number] = handle.pending[number] = part
            self._note_sent(part, num_bytes)
            number, last = number + 1, sent
        self._next_id = number
        for owner, slots in unsent:
            self._send_part(handle, owner, slots)
            last = time.monotonic()
        return last

    def _send(self, handle: RemoteHandle, slots: Ints) -> None:
        """slots: ascending flat places (row * k + slot) that need a worker."""
        owners = self._owners
        owner_of = owners.table[owners.row_of_layer[handle.layer]]
        slots, counts = split(handle.experts, slots, owner_of, len(owners))
        first = 0
        for owner, num in enumerate(counts, start=-1):
            if num:
                self._send_part(handle, owner, slots[first : first + num])
                first += num

    def _send_part(self, handle: RemoteHandle, owner: int, slots: Ints) -> None:
        if owner < 0:
            self._fail(handle, slots)
            return
        most = max(MAX_ANSWER_BYTES // handle.row_bytes, 1)
        for first in range(0, len(slots), most):
            self._send_message(handle, owner, slots[first : first + most])

    def _send_message(self, handle: RemoteHandle, owner: int, slots: Ints) -> None:
        link = self._owners.links[owner]
        assert link is not None, f"the table chose {self._owners.map.owners[owner]}, which has no link"
        number, self._next_id = self._next_id, self._next_id + 1
        part = Part(handle, owner, link, slots, time.monotonic() + DISPATCH_DEADLINE_S)
        self._open[number] = handle.pending[number] = part
        try:
            num_bytes = self._ask_for(number, part)
        except (LinkClosed, LinkFull):
            self._lost(link)
            return
        part.sent = time.monotonic()
        self._note_sent(part, num_bytes)

    def _ask_for(self, number: int, part: Part) -> int:
        """Returns the bytes that have left. Raises LinkClosed and LinkFull."""
        meta, payload = self._messages.write(part.handle, part.slots, number, self.epoch, self.phase)
        part.link.send(Kind.DISPATCH, meta, payload)
        return len(payload)

    def _note_sent(self, part: Part, num_bytes: int) -> None:
        counters, num_pairs = self.counters, len(part.slots)
        counters.hops += 1
        counters.rows += num_pairs
        counters.bytes_out += num_bytes
        self._owners.served[part.owner] += num_pairs

    def _all_slots(self, num: int) -> Ints:
        if len(self._slots) < num:
            self._slots = np.arange(num)
        return self._slots[:num]

    # ---- what comes back

    def _read_mail(self, handle: RemoteHandle) -> None:
        """Until something comes, or one of the handle's workers is overdue."""
        nearest = min(part.expires for part in handle.pending.values())
        events = deque(self.mail.poll(max(nearest - time.monotonic(), 0.0)))
        if not events:  # judged only when nothing is left to read: it may be us who slept
            self._give_up_overdue(handle)
        try:
            while events:
                self._on_event(events.popleft())
        finally:
            for event in events:
                self.mail.defer(event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Received) and event.message.kind in (Kind.ROWS, Kind.NOT_RESIDENT):
            try:
                self._on_reply(event.link, event.message)
            except (ValueError, struct.error) as error:
                event.link.close(f"{event.link.peer.name} sent a reply that cannot be read: {error}")
                self._lost(event.link)
        elif isinstance(event, Closed):
            self._lost(event.link)
            self.mail.defer(event)
        else:
            self.mail.defer(event)

    def _on_reply(self, link: Link, message: Message) -> None:
        part = self._open.get(NUMBER.unpack_from(message.meta)[0])
        if part is not None and part.link is not link:
            raise ValueError(f"{part.link.peer.name} was asked")
        if message.kind == Kind.ROWS:
            self._on_rows(message)
        else:
            self._on_not_resident(message)

    def _on_rows(self, message: Message) -> None:
        number, _, queue_ns, compute_ns, held_ns = ROWS.unpack(message.meta)
        part = self._open.get(number)
        if part is None:
            return  # a late packet: its slice was sent again and answered by another replica
        handle = part.handle
        expected = len(part.slots) * handle.row_bytes
        if len(message.payload) != expected:
            raise ValueError(f"{len(message.payload)} bytes of rows, {expected} were asked for")
        if len(part.slots) == len(handle.experts):
            rows = rows_from(message.payload, handle.x.dtype, handle.x.shape[1])
            handle.whole, handle.hold = rows.view(-1, handle.top_k, rows.shape[1]), message
        else:
            handle.take_in(part.slots, message.payload, self._buffers)
        self._note_rows(number, part, queue_ns, compute_ns, held_ns)

    def _note_rows(self, number: int, part: Part, queue_ns: int, compute_ns: int, held_ns: int) -> None:
        """A part's rows have come; nanoseconds that it queued, was computed, and was at the worker in all."""
        self._forget(number, part)
        counters, held_s = self.counters, held_ns / 1e9
        if part.sent + held_s > self._collecting_since:  # else they may have lain there while we computed
            counters.timed += 1
            # not less than none: we may have been stopped after a send and before we noted when it was
            counters.wire_s += max(time.monotonic() - part.sent - held_s, 0.0)
        counters.queue_s += queue_ns / 1e9
        counters.compute_s += compute_ns / 1e9
        counters.bytes_in += len(part.slots) * part.handle.row_bytes

    def _forget(self, number: int, part: Part) -> None:
        del self._open[number], part.handle.pending[number]

    def _take_back(self) -> None:
        """The rows that were lent are not read any more."""
        for handle in self._lent:
            if handle.buffer is not None:
                self._buffers.give_back(handle.buffer)
        self._lent.clear()

    # ---- what is lost

    def _on_not_resident(self, message: Message) -> None:
        """The map names a holder that does not hold: never ask it for these experts again."""
        number = NUMBER.unpack_from(message.meta)[0]
        part = self._open.get(number)
        if part is None:
            return
        experts = np.frombuffer(message.payload, dtype=np.int64)
        if not np.isin(experts, part.handle.experts[part.slots]).all() or not len(experts):  # would ask for ever
            raise ValueError(f"it has no experts {experts.tolist()}, and was not asked for them")
        self._forget(number, part)
        self._owners.forget(part.handle.layer, experts, part.owner)
        self._send_again(part)

    def _give_up_overdue(self, handle: RemoteHandle) -> None:
        now = time.monotonic()
        for part in [part for part in handle.pending.values() if part.expires <= now]:
            part.link.close(f"no reply for {DISPATCH_DEADLINE_S:.0f} s to a dispatch of layer {handle.layer}")
            self._lost(part.link)

    def _lost(self, link: Link) -> None:
        """Takes a worker out of the table and sends what it owed, to any handle, to other replicas."""
        if link not in self._owners.links:
            return
        owner = self._owners.links.index(link)
        self._owners.leave_out(owner)
        for number, part in list(self._open.items()):
            if part.owner == owner and number in self._open:  # a nested loss may have moved it already
                self._forget(number, part)
                self._send_again(part)

    def _send_again(self, part: Part) -> None:
        self.counters.resent += 1
        self._send(part.handle, part.slots)

    def _fail(self, handle: RemoteHandle, slots: Ints) -> None:
        handle.gathered(self._buffers).rows[torch.from_numpy(slots)] = 0.0
        for slot in slots.tolist():
            reason = f"no live replica of expert {handle.experts[slot]} of layer {handle.layer}"
            self.failed[handle.first_row + slot // handle.top_k] = reason
