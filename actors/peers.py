"""Whom an attention worker's requests talk to: the open link to each peer, and what waits to go out to front ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .links import Link, LinkClosed, LinkFull
from .messages import Kind, TokenItem, pack
from .reactor import Event

log = logging.getLogger(__name__)


class Peers:
    """One life of each peer: it is known from `Opened` on, and until it is closed or comes back.

    `describe_load` tells of room and queues, and of all counters when it is given True.
    """

    def __init__(self, describe_load: Callable[[bool], dict[str, Any]]) -> None:
        self._describe_load = describe_load
        self._links: dict[str, Link] = {}
        self.outbox: dict[str, list[TokenItem]] = {}

    def is_current(self, event: Event) -> bool:
        """False for what comes late from an earlier life of a peer (DESIGN law 3)."""
        return self._links.get(event.link.peer.name) is event.link

    def add(self, link: Link) -> Link | None:
        """Returns the peer's earlier link, if it had one."""
        old = self._links.get(link.peer.name)
        self._links[link.peer.name] = link
        return old

    def remove(self, name: str) -> None:
        del self._links[name]

    def link_to(self, name: str) -> Link | None:
        link = self._links.get(name)
        return link if link is not None and not link.closed else None

    def send(self, link: Link, kind: Kind, meta: bytes) -> bool:
        """What a peer has no room for ends its link: it would wait in vain for an answer or a block (DESIGN law 7)."""
        try:
            link.send(kind, meta)
        except (LinkClosed, LinkFull) as error:
            log.warning("%s to %s not sent: %s", kind.name, link.peer.name, error)
            link.close(str(error))
            return False
        return True

    def emit(self, front: str, item: TokenItem) -> None:
        self.outbox.setdefault(front, []).append(item)

    def flush(self) -> None:
        """One message per front end and step (DESIGN section 4), with counters where a request ends."""
        if not self.outbox:
            return
        load = self._describe_load(any(item.finish for items in self.outbox.values() for item in items))
        outbox, self.outbox = self.outbox, {}
        for front, items in outbox.items():
            link = self.link_to(front)
            if link is not None:
                self.send(link, Kind.TOKENS, pack({"load": load, "items": [item.wire() for item in items]}))
