"""One worker's place on the data plane: its listener, its links by peer name and the thread that serves them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .death_watch import DeathWatch
from .dialing import choose_transport, dial, host_id
from .links import DialFailed, Hello, Link, LinkClosed, LinkError, LinkFull
from .listener import Listener
from .reactor import Closed, Event, Opened, Reactor
from .settings import WorkerSettings
from .view import ClusterView, Transport, WorkerInfo

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 10.0
REDIAL_S, MAX_REDIAL_S = 1.0, 60.0  # doubled each time: a peer that hangs is worth ever fewer attempts
MAX_DIALS = 16  # at once: a host that is gone takes DIAL_TIMEOUT_S for each of its workers
STOP_TIMEOUT_S = 10.0

DialError = LinkError | ValueError | OSError


def _nothing(link: Link) -> None:
    pass


class Endpoint:
    """`inbox`, `poll` and `spin` belong to the serving thread; `apply`, `wake` and `stop` may be called from others."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.hello = Hello(settings.name, settings.role, settings.incarnation, host_id())
        self.on_death: Callable[[Link], None] = _nothing  # told at once, on the death watch's thread
        self._death_watch = DeathWatch(lambda link: self.on_death(link))
        self.reactor = Reactor(self._death_watch)
        self.spin = self.reactor.spin
        self.stopping = False
        self.failure: BaseException | None = None
        self._links: dict[str, Link] = {}
        self._targets: tuple[WorkerInfo, ...] = ()
        self._lives: dict[str, int] = {}
        self._epoch = 0
        self._transport: Transport = "auto"
        self._pauses: dict[str, tuple[float, float]] = {}  # by target: not before, and the pause that led to it
        self._lock = threading.Lock()
        self._dialing = threading.Lock()  # one thread dials at a time, so that nobody is dialed twice
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._ended = threading.Event()
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
        name = self.settings.name
        self._thread = threading.Thread(target=self._guard, args=(serve,), name=f"serve-{name}", daemon=True)
        self._thread.start()
        threading.Thread(target=self._keep_dialing, name=f"dial-{name}", daemon=True).start()

    def poll(self, timeout_s: float, is_urgent: bool = True) -> list[Event]:
        """New events only, by default awaited as the answer to something. Keeps the table of links."""
        return [event for event in self.reactor.poll(timeout_s, is_urgent) if self._admits(event)]

    def _admits(self, event: Event) -> bool:
        """False where a life that has been replaced comes late: its link would pass for its successor's (law 3)."""
        if isinstance(event, Opened):
            peer = event.link.peer
            if peer.incarnation < self._lives.get(peer.name, peer.incarnation):
                event.link.close("a later life of its peer is in the cluster")
                return False
            with self._lock:
                self._links[peer.name] = event.link
        elif isinstance(event, Closed):
            self._unlink(event.link)
        return True

    def defer(self, event: Event) -> None:
        """Keeps an event that came at a moment when it could not be handled."""
        self._deferred.append(event)

    def inbox(self, timeout_s: float) -> list[Event]:
        """Deferred events, then new ones; waits only when nothing was deferred."""
        events = list(self._deferred)
        self._deferred.clear()
        return events + self.poll(0.0 if events else timeout_s, is_urgent=False)

    def link_to(self, name: str) -> Link | None:
        """The open link to a peer, if there is one."""
        with self._lock:
            link = self._links.get(name)
        return link if link is not None and not link.closed else None

    def apply(self, view: ClusterView, targets: Sequence[WorkerInfo]) -> None:
        """Drops links to lives that left the cluster and dials those of `targets` that have none yet.

        Links that break later are dialed again. Raises LinkError when a target could not be reached within
        DIAL_TIMEOUT_S; the others are linked all the same.
        """
        lives = {worker.name: worker.incarnation for worker in view.workers}
        with self._dialing:
            if view.epoch < self._epoch:  # calls come in threads, and a later one may have been faster
                return
            self._epoch, self._lives = view.epoch, lives
            self._targets, self._transport = tuple(targets), view.transport
            self._pauses = {}
            with self._lock:
                links = list(self._links.values())
            for link in links:
                if link.peer.role != "front" and lives.get(link.peer.name) != link.peer.incarnation:
                    link.close("its peer left the cluster")
            errors = self._dial_all([target for target in targets if self.link_to(target.name) is None])
        self.reactor.wake()
        if errors:
            raise errors[0]

    def check(self) -> None:
        """Raises when the serving thread has failed: a worker that cannot serve must not look alive."""
        if self.failure is not None:
            raise RuntimeError(f"{self.settings.name} stopped serving: {self.failure}")

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
        """Ends the serving thread and closes everything; bounded by STOP_TIMEOUT_S.

        A step that takes longer finds its links closed, and the memory of their rings goes when it ends.
        """
        self.stopping = True
        self._ended.set()
        self.reactor.wake()
        if self._thread is None:
            self._close()
            return
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("a step of %s has not ended in %.0f s", self.settings.name, STOP_TIMEOUT_S)
            self._close_links()

    def _keep_dialing(self) -> None:
        """A link can break while both its ends live on: a reset, a queue that ran over, a missed deadline."""
        while not self._ended.wait(REDIAL_S):
            with self._dialing:
                for error in self._dial_all(self._due_targets(time.monotonic())):
                    log.info("%s dials again: %s", self.settings.name, error)

    def _due_targets(self, now: float) -> list[WorkerInfo]:
        missing = [target for target in self._targets if self.link_to(target.name) is None]
        due = [target for target in missing if self._pauses.get(target.name, (0.0, 0.0))[0] <= now]
        for target in due:
            pause_s = min(max(2 * self._pauses.get(target.name, (0.0, 0.0))[1], REDIAL_S), MAX_REDIAL_S)
            self._pauses[target.name] = (now + pause_s, pause_s)
        return due

    def _dial_all(self, targets: list[WorkerInfo]) -> list[DialError]:
        if not targets or self._ended.is_set():
            return []
        with ThreadPoolExecutor(min(len(targets), MAX_DIALS)) as pool:
            return [error for error in pool.map(self._dial, targets) if error is not None]

    def _dial(self, target: WorkerInfo) -> DialError | None:
        try:
            transport = choose_transport(self.hello, target.host_id, self._transport, bulk=True)
            link = dial(target, self.hello, self.settings.secret, transport, DIAL_TIMEOUT_S)
        except (LinkError, ValueError, OSError) as error:
            return error
        if (link.peer.name, link.peer.incarnation) != (target.name, target.incarnation):
            link.close("another life answers there")
            there = f"{link.peer.name}#{link.peer.incarnation}"
            return DialFailed(f"{there} answers where {target.name}#{target.incarnation} was")
        with self._lock:
            self._links[target.name] = link
        self.reactor.add(link)
        return None

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
        finally:
            self._close()

    def _close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._ended.set()
        self._close_links()
        self.reactor.close()
        self._death_watch.close()

    def _close_links(self) -> None:
        self.listener.close()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close(f"{self.settings.name} is stopping")
