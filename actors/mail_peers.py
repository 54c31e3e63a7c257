"""The expert workers that an attention worker shares memory with: who they are, who dies, and what the tables say.

All of it happens between passes, but for `bury`. A peer's memory is let go only when no pass is under way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.gpu import mail
from ..router.expert_map import ExpertMap
from ..router.replica_bias import ReplicaBias
from .links import Link, LinkClosed, LinkFull
from .mail_tables import MailTables
from .mailbox import ASLEEP, BUSY, Box, BoxShape, Pages, accepted, make_pages, offer
from .messages import Kind
from .reactor import Closed, Event, Received
from .remains import Remains
from .ways import Way, way

log = logging.getLogger(__name__)

WHY = {mail.SILENT: "it did not answer in time", mail.GONE: "it died", mail.REFUSED: "it lacks an expert of the map"}


@dataclass(slots=True, eq=False)
class MailPeer:
    """Our half of the memory is `offered` until the offer has been taken, and the box's from then on."""

    link: Link
    offered: Pages | None
    box: Box | None = None

    @property
    def has_mail(self) -> bool:
        return self.box is not None and self.link.closed is None

    def accept(self, meta: bytes, shape: BoxShape, device: torch.device) -> None:
        """The other half. Raises what `accepted` does, and ValueError where nothing is offered any more."""
        if self.offered is None:
            raise ValueError("no memory is offered to it")
        self.box = accepted(meta, shape, self.offered, device)
        self.offered = None

    def withdraw(self) -> None:
        """What was offered and not taken: nothing has been asked of the other end, so nobody will write there."""
        if self.offered is not None:
            self.offered.close()
            self.offered.disown()
            self.offered = None


class MailPeers:
    def __init__(self, expert_map: ExpertMap, shape: BoxShape, host_id: str, device: torch.device) -> None:
        """expert_map: only its layers and number of experts, which no later map changes."""
        self.shape = shape
        self.way: Way = "staged"
        self.layer_row = {layer: row for row, layer in enumerate(sorted(expert_map.replicas))}
        self.tables = MailTables.make(len(self.layer_row), expert_map.num_experts, shape.slots, device)
        self._host_id = host_id
        self._device = device
        self._map = expert_map
        self._bias = ReplicaBias(expert_map, list(self.layer_row))
        self._peers: dict[Link, MailPeer] = {}
        self._owners: list[MailPeer | None] = []  # of the map, in its order; None who is on no link of this host
        self._retired: list[Box] = []
        self._remains = Remains()
        self._lock = threading.Lock()  # guards who stands where and `gone`, for `bury`

    def set_map(self, expert_map: ExpertMap, links: Mapping[str, Link]) -> None:
        """Swaps to a published map, and offers to share memory with those of its owners who are new on this host."""
        lives = [(links.get(owner.worker), owner.incarnation) for owner in expert_map.owners]
        owners = [self._peer_of(link) if link and link.peer.incarnation == life else None for link, life in lives]
        with self._lock:
            self._map, self._owners = expert_map, owners
        self._fill(is_new=True)

    def hear(self, event: Event) -> None:
        """An event of any link; what is not of a mailbox is somebody else's."""
        peer = self._peers.get(event.link)
        if peer is None:
            return
        if isinstance(event, Closed):
            self._drop(peer)
            self._fill()
        elif isinstance(event, Received) and event.message.kind == Kind.MAIL_ACCEPTED and peer.box is None:
            try:
                peer.accept(event.message.meta, self.shape, self._device)
            except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
                log.warning("the memory of %s cannot be opened: %s", peer.link.peer.name, error)
            self._fill(is_new=True)
        elif isinstance(event, Received) and event.message.kind == Kind.MAIL_REFUSED and peer.box is None:
            peer.withdraw()
            log.info("%s shares no memory: %s", peer.link.peer.name, event.message.meta.decode(errors="replace"))

    def bury(self, link: Link) -> None:
        """Any thread: it has died, so that a device that waits for it need not wait until it is given up."""
        with self._lock:
            for index, peer in enumerate(self._owners):
                if peer is not None and peer.link is link:
                    self.tables.mark_gone(index)

    def wake(self) -> None:
        """A pass begins: no device can wake a process that sleeps."""
        for peer in self._owners:
            if peer is None or peer.box is None or not peer.has_mail:
                continue
            peer.box.bells.words[BUSY] = 1
            with self._lock:  # a fence: the other end looks at BUSY after it has set ASLEEP
                is_asleep = bool(peer.box.bells.words[ASLEEP])
            if is_asleep:
                try:
                    peer.link.send(Kind.MAIL_WAKE, b"")
                except (LinkClosed, LinkFull) as error:
                    log.info("%s is not woken: %s", peer.link.peer.name, error)  # the pass will find out

    def settle(self) -> bool:
        """The pass is over; the stream has been waited for. False if a peer failed: it is out of the tables now."""
        for peer in self._owners:
            if peer is not None and peer.box is not None:
                peer.box.bells.words[BUSY] = 0
        while self._retired:
            box = self._retired.pop()
            box.close()
            self._remains.keep(box.process, box.replies)
        lost = [(index, why) for index, why in enumerate(self.tables.told.tolist()) if why]
        for index, why in lost:
            peer = self._owners[index]
            if peer is None:
                continue
            log.warning("%s is given up: %s", peer.link.peer.name, WHY[why])
            if why == mail.REFUSED and peer.box is not None:
                self._retired.append(peer.box)  # over the link it can say what it has, until another link is made
                peer.box = None
            else:
                peer.link.close(f"{peer.link.peer.name} is given up: {WHY[why]}")
                self._drop(peer)
        if lost:
            self._fill()
        return not lost

    def balance(self, load: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        """load: [layers, experts] pairs of late. Moves the replica bias and says who computes what from now on."""
        owner_of = self._bias.table()
        has_owner = owner_of >= 0
        served = np.bincount(owner_of[has_owner], load[has_owner], minlength=len(self._owners))
        self._bias.update(served.astype(np.float64))
        self.tables.fill_owners(self._bias.table())

    def _peer_of(self, link: Link) -> MailPeer | None:
        peer = self._peers.get(link)
        if peer is None and link.peer.host_id == self._host_id and link.closed is None:
            self._remains.free()
            peer = MailPeer(link, None)
            try:
                peer.offered = make_pages(self.shape.reply_bytes, self._device)
                link.send(Kind.MAIL_OFFER, offer(self.shape, peer.offered))
            except (LinkClosed, LinkFull, OSError, RuntimeError) as error:  # memory is short, or cannot be shared here
                log.warning("no mailbox with %s: %s", link.peer.name, error)
                peer.withdraw()
                return None
            self._peers[link] = peer
        return peer

    def _drop(self, peer: MailPeer) -> None:
        self._peers.pop(peer.link, None)
        if peer in self._owners:
            with self._lock:
                self._owners[self._owners.index(peer)] = None
        peer.withdraw()
        if peer.box is not None:
            self._retired.append(peer.box)  # kernels of a pass under way may still use it

    def _fill(self, is_new: bool = False) -> None:
        """Rewrites the tables. `is_new`: owners have come, not only gone."""
        if self._device.type == "cuda":  # kernels of a pass that broke off may still tell the host of who failed
            torch.cuda.current_stream(self._device).synchronize()
        if is_new:
            self._bias = ReplicaBias(self._map, list(self.layer_row))
        has_mail = [peer is not None and peer.has_mail for peer in self._owners]
        self.way = way(self._map, has_mail)
        addresses: list[tuple[int, ...] | None] = []
        for index, peer in enumerate(self._owners[: mail.MAX_PEERS]):
            is_there = peer is not None and peer.box is not None and has_mail[index]
            addresses.append(peer.box.addresses() if is_there and peer and peer.box else None)
        for index, is_there in enumerate(has_mail):
            if not is_there:
                self._bias.drop(index)
        self.tables.fill_peers(addresses)
        self.tables.fill_owners(self._bias.table())
        with self._lock:
            self.tables.gone.zero_()
            for index, peer in enumerate(self._owners[: mail.MAX_PEERS]):
                if peer is not None and peer.link.closed is not None:
                    self.tables.mark_gone(index)
