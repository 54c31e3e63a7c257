"""RemoteExperts whose rows stay on the device: a link carries who wants what, its pair the rows.

The host waits for the expert ids of each layer, and for rows once it has been told that they come. While some expert
has no owner with a pair, rows are an ordinary RemoteExperts'. A pair and its link end together, and no others: what
was on its way is asked of another replica (law 4), through a pair or, where none is left, from a copy over its link.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from ..model.from_device import Aside
from ..model.to_device import on_device
from ..router.expert_map import ExpertMap
from .dispatch import NUMBER, Mail, RemoteExperts
from .hops import Part, RemoteHandle
from .links import DialFailed, Link, LinkClosed, LinkError, LinkFull, Message
from .messages import DISPATCH, ROWS, Kind
from .nccl_pair import ATTENTION, RowPair, Transfer, join
from .pair_store import PairStore
from .pairs import Ints, encode_pairs
from .reactor import Closed, Event, Received
from .row_buffers import RowBuffer, RowBuffers
from .ways import way
from .wire import DTYPE_CODES, rows_from

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 30.0  # NCCL's first communicator of a process takes seconds
MIN_WAIT_S = 5.0  # for rows that have been told of: it may be us who were late to read it


@dataclass(slots=True)
class PairedHandle(RemoteHandle):
    """x and what comes back are on the device."""

    copied: Tensor | None = None
    memory: RowBuffer | None = None

    def host_x(self) -> Tensor:
        if self.copied is None:
            self.copied = self.x.cpu()
        return self.copied

    def take_in(self, slots: Ints, payload: memoryview, buffers: RowBuffers) -> None:
        self.put(slots, on_device(rows_from(payload, self.x.dtype, self.x.shape[1]), self.x.device))

    def put(self, slots: Ints, rows: Tensor) -> None:
        """rows: [slots, hidden] on the device."""
        if len(slots) == len(self.experts):
            self.whole = rows.view(-1, self.top_k, rows.shape[1])
        else:
            self._rows().rows.index_copy_(0, on_device(torch.from_numpy(slots), rows.device), rows)

    def gathered(self, buffers: RowBuffers) -> RowBuffer:
        return self._rows()

    def _rows(self) -> RowBuffer:
        if self.memory is None:
            self.memory = RowBuffer(self.x.new_empty(len(self.experts), self.x.shape[1]), memoryview(b""))
        return self.memory


class PairedExperts(RemoteExperts):
    """Used by the engine thread only. `host`: the address here that pairs are joined from; `host_id` names our host."""

    def __init__(self, mail: Mail, num_experts: int, device: torch.device, host: str, host_id: str) -> None:
        super().__init__(mail, num_experts)
        self._device, self._host, self._host_id = device, host, host_id
        self._aside = Aside(device)  # rows that leave do not wait for the shared expert, which is launched before
        self._pairs: dict[Link, RowPair | None] = {}  # None: asked for
        self._stores: dict[Link, PairStore] = {}  # of those that have answered
        self._joined: SimpleQueue[tuple[Link, RowPair]] = SimpleQueue()
        self._unfit: set[tuple[str, int]] = set()  # lives whose pair broke while their link held
        self._sent: dict[int, tuple[Link, Transfer]] = {}  # by number, until it is answered, wanted or not
        self._form = 0, torch.bfloat16  # of rows: their width and type

    def set_map(self, expert_map: ExpertMap, links: Mapping[str, Link]) -> None:
        """Swaps to a published map; asks those of its owners who are new for a pair, if some are on other hosts."""
        super().set_map(expert_map, links)
        linked = [link for link in self._owners.links if link is not None]
        if any(link.peer.host_id != self._host_id for link in linked):
            for link in linked:
                self._ask(link)
        self._choose_owners()

    def hear(self, event: Event) -> None:
        """An event of any link, between passes."""
        if isinstance(event, Closed):
            self._lost(event.link)
        elif isinstance(event, Received) and event.message.kind == Kind.PAIR_ENTRY:
            self._on_pair_entry(event.link, event.message)
        elif isinstance(event, Received) and event.message.kind == Kind.PAIRED_ROWS:
            self._on_paired_rows(event.link, event.message)
        elif isinstance(event, Received) and event.message.kind == Kind.NOT_RESIDENT:
            self._on_not_resident(event.message)
        self._admit()

    def end_step(self) -> None:
        super().end_step()
        self._admit()

    def close(self) -> None:
        """Ends all pairs, and their links."""
        for link in list(self._pairs):
            self._drop(link)

    def _ask(self, link: Link) -> None:
        life = link.peer.name, link.peer.incarnation
        if link in self._pairs or life in self._unfit:
            return
        with suppress(LinkClosed, LinkFull):
            link.send(Kind.PAIR_ASK, b"")
            self._pairs[link] = None

    def _on_pair_entry(self, link: Link, message: Message) -> None:
        """The first one says that there will be a pair."""
        if link not in self._pairs:
            return
        store, name = self._stores.get(link), link.peer.name
        if store is None:
            store = PairStore(name, lambda meta: link.send(Kind.PAIR_ENTRY, meta), JOIN_TIMEOUT_S)
            self._stores[link] = store
            threading.Thread(target=self._join, args=(link, store), name=f"pair-{name}", daemon=True).start()
        try:
            store.hear(message.meta)
        except ValueError as error:
            link.close(f"{name} sent an entry that cannot be read: {error}")
            self._lost(link)

    def _join(self, link: Link, store: PairStore) -> None:
        """On a thread of its own: the other side may take its time."""
        try:
            pair = join(link.peer.name, ATTENTION, store, self._host, self._device, JOIN_TIMEOUT_S)
        except DialFailed as error:
            log.warning("rows for %s go through host memory: %s", link.peer.name, error)
        else:
            self._joined.put((link, pair))

    def _admit(self) -> None:
        """Pairs that have been joined are used from the next pass on."""
        if self._joined.empty():
            return
        while not self._joined.empty():
            link, pair = self._joined.get()
            if link in self._pairs and link.closed is None:
                self._pairs[link] = pair
            else:
                pair.close("its link is closed")
        self._choose_owners()

    def _choose_owners(self) -> None:
        """Those with a pair if they have every expert among them, else all that are linked."""
        owners = self._owners
        is_linked = [link is not None and link.closed is None for link in owners.links]
        has_pair = [
            is_there and link is not None and self._pairs.get(link) is not None
            for is_there, link in zip(is_linked, owners.links, strict=True)
        ]
        self.is_paired = way(owners.map, has_pair=has_pair) == "paired"
        owners.choose(has_pair if self.is_paired else is_linked)
        if self.is_paired:
            self._direct = None  # which reads and writes host memory only

    def _form_of_handle(self, x: Tensor) -> type[RemoteHandle]:
        if self._direct is not None or x.device != self._device:
            return RemoteHandle
        assert x.is_contiguous(), (
            f"rows of strides {x.stride()} would be copied now, and may not be there when they leave"
        )
        return PairedHandle

    def _ask_for(self, number: int, part: Part) -> int:
        pair, handle = self._pairs.get(part.link), part.handle
        if pair is None or not isinstance(handle, PairedHandle):
            return super()._ask_for(number, part)
        needed, pairs = encode_pairs(handle.experts, part.slots, handle.top_k)
        code, num_pairs = DTYPE_CODES[handle.x.dtype], len(part.slots)
        meta = DISPATCH.pack(number, self.epoch, handle.layer, self.phase, code, len(needed), num_pairs)
        part.link.send(Kind.PAIRED_DISPATCH, meta, pairs)
        with self._aside.after(None):  # x is there: the host has waited for ids that were computed from it
            x = handle.x.index_select(0, on_device(torch.from_numpy(needed), self._device))
            self._sent[number] = part.link, pair.send(x)
        self._form = x.shape[1], x.dtype
        return pairs.nbytes + x.nbytes

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Received) and event.message.kind == Kind.PAIRED_ROWS:
            self._on_paired_rows(event.link, event.message)
        elif isinstance(event, Received) and event.message.kind == Kind.PAIR_ENTRY:
            self._on_pair_entry(event.link, event.message)
        else:
            super()._on_event(event)

    def _on_paired_rows(self, link: Link, message: Message) -> None:
        """Also of a dispatch whose step broke off: what comes through the pair is in the order of these messages."""
        pair = self._pairs.get(link)
        if pair is None:
            return
        number, num_pairs, queue_ns, compute_ns, held_ns = ROWS.unpack(message.meta)
        self._sent.pop(number, None)
        part = self._open.get(number)
        if part is not None and (part.link is not link or len(part.slots) != num_pairs):
            link.close(f"it told of {num_pairs} rows, {len(part.slots)} were asked for of {part.link.peer.name}")
            self._lost(link)
            return
        expires = part.expires if part is not None else 0.0
        width, dtype = self._form
        rows = torch.empty(num_pairs, width, dtype=dtype, device=self._device)
        try:
            pair.receive(rows).wait(max(expires - time.monotonic(), MIN_WAIT_S))
        except LinkError:  # the pair is closed, and says why
            self._lost(link)
            return
        if part is not None and isinstance(part.handle, PairedHandle):
            part.handle.put(part.slots, rows)
            self._note_rows(number, part, queue_ns, compute_ns, held_ns)

    def _on_not_resident(self, message: Message) -> None:
        self._sent.pop(NUMBER.unpack_from(message.meta)[0], None)
        super()._on_not_resident(message)

    def _lost(self, link: Link) -> None:
        if link in self._pairs:
            self._drop(link)
            self._choose_owners()
        super()._lost(link)

    def _drop(self, link: Link) -> None:
        """Both ends of a pair count its messages: a pair that is in doubt is of no use, nor is its link."""
        pair, store = self._pairs.pop(link), self._stores.pop(link, None)
        if store is not None:
            store.close("its link is closed")
        if pair is None:
            return
        if pair.closed is not None and link.closed is None:
            self._unfit.add((link.peer.name, link.peer.incarnation))
        pair.close("its link is closed")
        link.close(f"the pair with it is closed: {pair.closed}")
        self._sent = {number: sent for number, sent in self._sent.items() if sent[0] is not link}
