"""One worker's place on the data plane: its listener, its links by peer name and the thread that serves them."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .death_watch import DeathWatch
from .dialing import choose_transport, dial, host_id
from .links import Hello, Link, LinkClosed, LinkFull
from .listener import Listener
from .reactor import Closed, Event, Opened, Reactor
from .settings import WorkerSettings
from .view import ClusterView, WorkerInfo

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0


class Endpoint:
    """`inbox` and `poll` belong to the serving thread; `apply`, `wake` and `stop` may be called from others."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.hello = Hello(settings.name, settings.role, settings.incarnation, host_id())
        self._death_watch = DeathWatch()
        self.reactor = Reactor(self._death_watch)
        self.stopping = False
        self.failure: BaseException | None = None
        self._links: dict[str, Link] = {}
        self._lock = threading.Lock()
        self._deferred: deque[Event] = deque()
        unix_path = str(Path(settings.run_dir) / f"{settings.name}.{settings.incarnation}")
        self.listener = Listener(self.hello, settings.secret, unix_path, settings.tcp_host, self.reactor.add)
        self.info = WorkerInfo(
            settings.name,
            settings.role,
            settings.incarnation,
            self.hello.host_id,
            unix_path,
            settings.tcp_host,
            self.listener.tcp_port,
            os.getpid(),
            settings.node,
        )

    def start(self, serve: Callable[[], None]) -> None:
        """Runs `serve` on the endpoint's own thread until `stopping`; if it raises, every link is closed at once."""
        self._thread = threading.Thread(target=self._guard, args=(serve,), name=f"serve-{self.settings.name}")
        self._thread.daemon = True
        self._thread.start()

    def poll(self, timeout_s: float) -> list[Event]:
        """New events only. Keeps the table of links."""
        events = self.reactor.poll(timeout_s)
        for event in events:
            if isinstance(event, Opened):
                with self._lock:
                    self._links[event.link.peer.name] = event.link
            elif isinstance(event, Closed):
                self._unlink(event.link)
        return events

    def defer(self, event: Event) -> None:
        """Keeps an event that came at a moment when it could not be handled."""
        self._deferred.append(event)

    def inbox(self, timeout_s: float) -> list[Event]:
        """Deferred events, then new ones; waits only when nothing was deferred."""
        events = list(self._deferred)
        self._deferred.clear()
        return events + self.poll(0.0 if events else timeout_s)

    def link_to(self, name: str) -> Link | None:
        """The open link to a peer, if there is one."""
        with self._lock:
            link = self._links.get(name)
        return link if link is not None and not link.closed else None

    def apply(self, view: ClusterView, targets: Sequence[WorkerInfo]) -> None:
        """Drops links to lives that left the cluster and dials those of `targets` that have none yet.

        Raises LinkError when a target cannot be reached within DIAL_TIMEOUT_S.
        """
        lives = {worker.name: worker.incarnation for worker in view.workers}
        with self._lock:
            links = list(self._links.values())
        for link in links:
            known = lives.get(link.peer.name)
            if link.peer.role != "front" and known != link.peer.incarnation:
                link.close("its peer left the cluster")
        for target in targets:
            if self.link_to(target.name) is None:
                transport = choose_transport(self.hello, target.host_id, view.transport, bulk=True)
                link = dial(target, self.hello, self.settings.secret, transport, DIAL_TIMEOUT_S)
                with self._lock:
                    self._links[target.name] = link
                self.reactor.add(link)
        self.reactor.wake()

    def broadcast(self, role: str, kind: int, meta: bytes) -> None:
        """Sends to every peer of a role; one that cannot take it is dropped by its own link's rules."""
        with self._lock:
            links = [link for link in self._links.values() if link.peer.role == role]
        for link in links:
            try:
                link.send(kind, meta)
            except (LinkClosed, LinkFull) as error:
                log.warning("nothing sent to %s: %s", link.peer.name, error)

    def describe_links(self) -> list[dict[str, Any]]:
        with self._lock:
            links = list(self._links.values())
        return [
            {
                "peer": link.peer.name,
                "transport": link.transport,
                "bytes_sent": link.bytes_sent,
                "bytes_received": link.bytes_received,
            }
            for link in links
        ]

    def stop(self) -> None:
        """Ends the serving thread and closes everything; bounded by STOP_TIMEOUT_S."""
        self.stopping = True
        self.reactor.wake()
        self._thread.join(STOP_TIMEOUT_S)
        self._close()

    def _unlink(self, link: Link) -> None:
        with self._lock:
            if self._links.get(link.peer.name) is link:
                del self._links[link.peer.name]

    def _guard(self, serve: Callable[[], None]) -> None:
        try:
            serve()
        except BaseException as error:
            log.exception("%s stopped serving", self.settings.name)
            self.failure = error
            self._close()
            raise

    def _close(self) -> None:
        self.listener.close()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close(f"{self.settings.name} is stopping")
        self.reactor.close()
        self._death_watch.close()
