"""One epoll over all links of an engine thread: messages in, queued bytes out, every opening and closing told once."""

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .death_watch import DeathWatch
from .links import Link, Message
from .pipe import PeerGone
from .shm_pipe import doze, rouse
from .spin import SPIN_NS, Outcome, Patience, spin

T = TypeVar("T")

MAX_MESSAGES_A_TURN = 256  # of one link in one poll, so that a talkative peer cannot starve the others
MAX_READY = 64
MAX_UNASKED = 8  # polls in a row that find messages in rings and so leave the epoll, a system call, for later


@dataclass(slots=True)
class Opened:
    link: Link


@dataclass(slots=True)
class Received:
    link: Link
    message: Message


@dataclass(slots=True)
class Closed:
    link: Link
    reason: str


Event = Opened | Received | Closed


class Reactor:
    """Owned by the thread that polls; `add` and `wake` may be called by any."""

    def __init__(self, death_watch: DeathWatch | None = None) -> None:
        self._death_watch = death_watch
        self._epoll = select.epoll()
        self._epoll_fd = self._epoll.fileno()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._lock = threading.Lock()
        self._is_closed = False
        self._joining: deque[Link] = deque()
        self._fds: dict[Link, list[int]] = {}
        self._links: dict[int, Link] = {}
        self._rings: dict[Link, int] = {}
        self._ring_words: tuple[int, ...] = ()
        self._patience = Patience()
        self._has_spun = False
        self._num_unasked = 0
        self._unfinished: dict[Link, None] = {}  # links whose turn ended before their bytes did

    def add(self, link: Link) -> None:
        """The next poll tells Opened, then what the link receives."""
        with self._lock:
            if self._is_closed:
                link.close("the reactor closed")
                return
            link.attach()
            self._joining.append(link)
        self.wake()
        if self._death_watch is not None:
            self._death_watch.watch(link)

    def wake(self) -> None:
        """Makes the poll under way, or the next one, return at once."""
        with self._lock:  # a closed fd's number may belong to somebody else by now
            if not self._is_closed:
                os.eventfd_write(self._wake_fd, 1)

    def fileno(self) -> int:
        """Readable when a poll would find something, for a loop that polls with 0 then. It hears of no rings."""
        return self._epoll.fileno()

    @property
    def has_unread(self) -> bool:
        """Whether a link's turn ended before its bytes did: the next poll goes on with it."""
        return bool(self._unfinished)

    def poll(self, timeout_s: float | None, is_urgent: bool = False) -> list[Event]:
        """What happened, waiting for it up to `timeout_s` (None: as long as it takes). May return nothing early.

        An urgent wait begins with a spin: for who expects an answer at once.
        """
        due, self._unfinished = self._unfinished, {}
        self._look(due)
        is_urgent, self._has_spun = is_urgent and not self._has_spun, False
        if is_urgent and not due and timeout_s != 0 and self._patience.is_worth_it():
            self._patience.learn(spin(self._ring_words, self._epoll.fileno()))
            self._look(due)
        is_dozing = timeout_s != 0 and not due and bool(self._rings)
        if due or (is_dozing and not doze(self._ring_words)):
            timeout_s = 0
        self._num_unasked = self._num_unasked + 1 if due else MAX_UNASKED
        if self._num_unasked >= MAX_UNASKED:
            self._num_unasked = 0
            self._ask_epoll(timeout_s, due)
        if is_dozing:
            rouse(self._ring_words)
            self._look(due)
        events: list[Event] = []
        for link in due:
            self._take_turn(link, events)
        while self._joining:
            self._admit(self._joining.popleft(), events)
        return events

    def spin(self, look: Callable[[int, int], T | int]) -> T | None:
        """What `look(epoll fd, nanoseconds to spin)` takes out of rings itself, past the events; None: poll now.

        It looks no further than to a message that is not for it, or to what the epoll knows, and gives an Outcome then.
        """
        found = look(self._epoll_fd, SPIN_NS if self._patience.is_worth_it() else 0)
        if not isinstance(found, int):
            self._patience.learn(Outcome.NEWS)
            return found
        self._patience.learn(Outcome(found))
        self._has_spun = found != Outcome.NEWS
        return None

    def _ask_epoll(self, timeout_s: float | None, due: dict[Link, None]) -> None:
        for fd, mask in self._epoll.poll(-1 if timeout_s is None else timeout_s, MAX_READY):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            else:
                link = self._links[fd]
                link.ready(fd, mask)
                due[link] = None

    def _look(self, due: dict[Link, None]) -> None:
        """Adds the links whose rings hold something new."""
        for link in self._rings:
            if link.look():
                due[link] = None

    def links(self) -> list[Link]:
        return list(self._fds)

    def close(self) -> None:
        """Closes every link and frees every fd; no events follow."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        for link in [*self._fds, *self._joining]:
            link.close("the reactor closed")
            link.release()
        self._fds.clear()
        self._links.clear()
        self._rings.clear()
        self._ring_words = ()
        self._joining.clear()
        self._epoll.close()
        os.close(self._wake_fd)

    def _admit(self, link: Link, events: list[Event]) -> None:
        events.append(Opened(link))
        self._fds[link] = link.register(self._epoll)
        for fd in self._fds[link]:
            self._links[fd] = link
        if self._fds[link] and (words := link.incoming_words()) is not None:
            self._rings[link] = words
            self._ring_words = tuple(self._rings.values())
            rouse((words,))
        if not self._fds[link]:
            self._retire(link, events)

    def _take_turn(self, link: Link, events: list[Event]) -> None:
        try:
            for _ in range(MAX_MESSAGES_A_TURN):
                message = link.receive()
                if message is None:
                    return
                events.append(Received(link, message))
        except PeerGone:
            self._retire(link, events)
            return
        self._unfinished[link] = None

    def _retire(self, link: Link, events: list[Event]) -> None:
        fds = self._fds.pop(link)
        link.unregister(fds)
        for fd in fds:
            del self._links[fd]
        self._unfinished.pop(link, None)
        if self._rings.pop(link, None) is not None:
            self._ring_words = tuple(self._rings.values())
        link.release()
        events.append(Closed(link, link.closed or "closed"))
