"""A front end's links to all attention workers, polled by the asyncio loop that uses them.

Only dialing takes threads: one that polled would hand over every message, after waiting for the interpreter lock.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from ..actors.dialing import choose_transport, dial, host_id
from ..actors.links import Hello, Link, LinkClosed, LinkError, LinkFull
from ..actors.messages import Kind, unpack
from ..actors.reactor import Closed, Event, Opened, Reactor
from ..actors.view import ClusterView, Role, WorkerInfo
from .request import FrontEndSettings

REDIAL_S = (0.1, 0.25, 0.5, 1.0, 2.0)  # a view can be newer than the worker's listener, or older than its death

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joined:
    worker: str
    role: Role


@dataclass(frozen=True, slots=True)
class Left:
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Told:
    worker: str
    kind: Kind
    body: dict[str, Any]


News = Joined | Left | Told


class _Attempt:
    """One dial, in a thread, which cannot be cancelled: nobody may be left to take what it makes, not even the loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._is_given_up = False

    def make(self, dial_once: Callable[[], Link]) -> Link:
        link = dial_once()
        with self._lock:
            self._link = link
            is_late = self._is_given_up
        if is_late:
            link.close("no longer wanted")
        return link

    def give_up(self) -> None:
        with self._lock:
            self._is_given_up = True
            link = self._link
        if link is not None:
            link.close("no longer wanted")


class FrontLinks:
    """Keeps one link to every attention worker of the newest view; `on_news` gets what they tell, in order."""

    def __init__(self, settings: FrontEndSettings, on_news: Callable[[list[News]], None]) -> None:
        self.settings = settings
        self.hello = Hello(settings.name, "front", settings.incarnation, settings.host_id or host_id())
        self.on_news = on_news
        self._loop = asyncio.get_running_loop()
        self._reactor = Reactor()
        self._links: dict[str, Link] = {}
        self._wanted: dict[str, WorkerInfo] = {}
        self._dialing: dict[str, asyncio.Task[None]] = {}
        self._view: ClusterView | None = None
        self._is_closed = False  # no more dialing and polling
        self._is_open = True  # the reactor's fds
        self._loop.add_reader(self._reactor.fileno(), self._poll)

    async def apply(self, view: ClusterView) -> None:
        """Drops links to lives that left, dials new ones and returns after one attempt. Old views are ignored."""
        if self._is_closed or (self._view is not None and view.epoch < self._view.epoch):
            return
        self._view = view
        self._wanted = {worker.name: worker for worker in view.of_role("prefill", "decode", "both")}
        for name, link in list(self._links.items()):
            if not self._is_wanted(name, link.peer.incarnation):
                link.close(f"{name} left the cluster")
                self._lose(name, f"{name} left the cluster")
        attempts = [self._dial_soon(worker) for worker in self._wanted.values() if worker.name not in self._links]
        if attempts:
            await asyncio.wait(attempts, timeout=2 * self.settings.link_timeout_s)

    def send(self, worker: str, kind: Kind, meta: bytes) -> str | None:
        """None when the message is on its way, else the reason why it is not."""
        link = self._links.get(worker)
        if link is None:
            return f"no link to {worker}"
        try:
            link.send(kind, meta)
        except (LinkClosed, LinkFull) as error:
            return str(error)
        return None

    async def close(self) -> None:
        self._is_closed = True
        tasks = list(self._dialing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._reactor.fileno())
            self._reactor.close()

    # ---- dialing

    def _is_wanted(self, name: str, incarnation: int) -> bool:
        return not self._is_closed and name in self._wanted and self._wanted[name].incarnation == incarnation

    def _dial_soon(self, worker: WorkerInfo) -> asyncio.Future[None]:
        """Dials in the background until the worker is linked or no longer wanted; the future ends with one attempt."""
        first = self._loop.create_future()
        task = self._loop.create_task(self._keep_dialing(worker, self._dialing.get(worker.name), first))
        self._dialing[worker.name] = task
        task.add_done_callback(lambda _: self._forget_dialing(worker.name, task, first))
        return first

    def _forget_dialing(self, name: str, task: asyncio.Task[None], first: asyncio.Future[None]) -> None:
        if self._dialing.get(name) is task:
            del self._dialing[name]
        if not first.done():
            first.set_result(None)

    async def _keep_dialing(
        self, worker: WorkerInfo, previous: asyncio.Task[None] | None, first: asyncio.Future[None]
    ) -> None:
        if previous is not None:  # one at a time: it may be linking this very life
            previous.cancel()
            await asyncio.wait([previous])
        for attempt in itertools.count():
            if not self._is_wanted(worker.name, worker.incarnation) or worker.name in self._links:
                return
            link = await self._dial(worker)
            if link is not None and self._take(worker, link):
                return
            if not first.done():
                first.set_result(None)
            await asyncio.sleep(REDIAL_S[min(attempt, len(REDIAL_S) - 1)])

    async def _dial(self, worker: WorkerInfo) -> Link | None:
        assert self._view is not None, "dialing without a view"
        settings, attempt = self.settings, _Attempt()
        try:
            transport = choose_transport(self.hello, worker.host_id, self._view.transport, bulk=False)
            dial_once = partial(dial, worker, self.hello, settings.secret, transport, settings.link_timeout_s)
            return await asyncio.to_thread(attempt.make, dial_once)
        except asyncio.CancelledError:
            attempt.give_up()
            raise
        except (LinkError, ValueError) as error:
            log.warning("%s cannot reach %s#%d: %s", settings.name, worker.name, worker.incarnation, error)
            return None

    def _take(self, worker: WorkerInfo, link: Link) -> bool:
        is_theirs = (link.peer.name, link.peer.incarnation) == (worker.name, worker.incarnation)
        if not is_theirs or not self._is_wanted(worker.name, worker.incarnation):
            link.close("another life answers there")
            return False
        self._links[worker.name] = link
        self._reactor.add(link)
        return True

    def _lose(self, name: str, reason: str) -> None:
        del self._links[name]
        self.on_news([Left(name, reason)])

    # ---- what the workers say

    def _poll(self) -> None:
        if self._is_closed:
            return
        try:
            events = self._reactor.poll(0)
        except Exception:
            log.exception("%s lost all its links: they cannot be polled", self.settings.name)
            self._lose_all()  # nobody would hear their replies any more
            return
        if self._reactor.has_unread:
            self._loop.call_soon(self._poll)
        if news := [(event.link, told) for event in events if (told := _read(event))]:
            self._hear(news)

    def _lose_all(self) -> None:
        self._is_closed = True
        self._loop.remove_reader(self._reactor.fileno())
        for name, link in list(self._links.items()):
            link.close("the front end cannot poll its links")
            self._lose(name, "the front end cannot poll its links")

    def _hear(self, batch: list[tuple[Link, News]]) -> None:
        """What an earlier life's link still had to say is dropped."""
        current = [(link, news) for link, news in batch if self._links.get(link.peer.name) is link]
        self.on_news([news for _, news in current])
        for link, news in current:
            if isinstance(news, Left) and self._links.get(news.worker) is link:
                del self._links[news.worker]
                if news.worker in self._wanted and not self._is_closed:
                    self._dial_soon(self._wanted[news.worker])


def _read(event: Event) -> News | None:
    peer = event.link.peer
    if isinstance(event, Opened):
        return Joined(peer.name, cast(Role, peer.role))
    if isinstance(event, Closed):
        return Left(peer.name, event.reason)
    try:
        return Told(peer.name, Kind(event.message.kind), unpack(event.message.meta))
    except ValueError as error:
        event.link.close(f"{peer.name} sent a message that cannot be read: {error}")  # Closed follows
        return None
