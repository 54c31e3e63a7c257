"""Both ends of a link under test: LinkHost in the test's process, and a peer that runs this file as a program."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braid.actors.death_watch import DeathWatch
from braid.actors.dialing import dial, host_id
from braid.actors.framing import frame_pieces
from braid.actors.links import DEFAULT_MAX_QUEUED_BYTES, Hello, Link, LinkFull
from braid.actors.listener import Listener
from braid.actors.reactor import Closed, Event, Opened, Reactor, Received

SECRET = b"a secret of thirty-two bytes....."
TRANSPORTS: tuple[Literal["shm", "unix", "tcp"], ...] = ("shm", "unix", "tcp")
TIMEOUT_S = 60.0
RING_BYTES = 1 << 20
ECHO, REPORT, FLOOD = 1, 2, 3
Mode = Literal["echo", "digest", "deaf", "half", "last_words", "flood"]
FLOOD_MESSAGES, FLOOD_BYTES, FLOOD_QUEUE_BYTES = 120, 500_000, 2_000_000


@dataclass(frozen=True)
class Address:
    unix_path: str
    tcp_host: str
    tcp_port: int


@dataclass
class Peer:
    process: subprocess.Popen[bytes]
    link: Link

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)


class LinkHost:
    """A listener and a reactor; keeps every event in order."""

    def __init__(self, folder: Path, max_queued_bytes: int = DEFAULT_MAX_QUEUED_BYTES) -> None:
        self.hello = Hello("host", "both", 1, host_id())
        self.deaths: list[tuple[Link, float]] = []
        self.watch = DeathWatch(lambda link: self.deaths.append((link, time.monotonic())))
        self.reactor = Reactor(self.watch)
        self.listener = Listener(
            self.hello, SECRET, str(folder / "host"), "127.0.0.1", self.reactor.add, max_queued_bytes
        )
        self.address = Address(str(folder / "host"), "127.0.0.1", self.listener.tcp_port)
        self.events: list[Event] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, mode: Mode, transport: Literal["shm", "unix", "tcp"]) -> Peer:
        seen = len(self.events)
        command = [sys.executable, __file__, mode, transport, self.address.unix_path, str(self.address.tcp_port)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._processes.append(process)
        return Peer(process, self._opened(seen, f"a {mode} peer"))

    def dial(self, transport: Literal["shm", "unix", "tcp"], reactor: Reactor) -> tuple[Link, Link]:
        """A link whose two ends are both in this process: the host's, then the dialer's in `reactor`."""
        seen = len(self.events)
        link = dial(
            self.address, Hello("dialer", "both", 7, host_id()), SECRET, transport, TIMEOUT_S, ring_bytes=RING_BYTES
        )
        reactor.add(link)
        return self._opened(seen, "the dialed link"), link

    def _opened(self, seen: int, what: str) -> Link:
        """The link that comes next; older ones may have more to tell meanwhile."""

        def opened() -> list[Link]:
            return [event.link for event in self.events[seen:] if isinstance(event, Opened)]

        self.until(lambda: bool(opened()), what)
        return opened()[0]

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"waited in vain for {what}"
            self.events += self.reactor.poll(min(left, 0.5))

    def received(self, link: Link) -> list[Received]:
        return [event for event in self.events if isinstance(event, Received) and event.link is link]

    def closed(self, link: Link) -> str | None:
        reasons = [event.reason for event in self.events if isinstance(event, Closed) and event.link is link]
        assert len(reasons) <= 1
        return reasons[0] if reasons else None

    def until_closed(self, link: Link) -> str:
        self.until(lambda: self.closed(link) is not None, f"the end of {link}")
        return str(self.closed(link))

    def close(self) -> None:
        self.listener.close()
        self.reactor.close()
        self.watch.close()
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


class Digest:
    """What arrived, in order, in one number."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self.count = 0

    def add(self, kind: int, meta: bytes, payload: bytes | memoryview) -> None:
        self.count += 1
        self._sum.update(b"%d %d %d;" % (kind, len(meta), len(payload)))
        self._sum.update(meta)
        self._sum.update(payload)

    def report(self) -> bytes:
        return b"%d %s" % (self.count, self._sum.hexdigest().encode())


def flood(reactor: Reactor, link: Link) -> tuple[bytes, list[Event]]:
    """Sends and receives as fast as both sides can; returns the digest of what came, and the other events."""
    digest, sent, payload = Digest(), 0, bytes(FLOOD_BYTES)
    others: list[Event] = []
    while sent < FLOOD_MESSAGES or digest.count < FLOOD_MESSAGES:
        try:
            while sent < FLOOD_MESSAGES:
                link.send(FLOOD, b"%d" % sent, payload)
                sent += 1
        except LinkFull:
            timeout_s = TIMEOUT_S
        else:
            timeout_s = TIMEOUT_S if digest.count < FLOOD_MESSAGES else 0
        for event in reactor.poll(timeout_s):
            if isinstance(event, Received) and event.message.kind == FLOOD:
                digest.add(FLOOD, event.message.meta, event.message.payload)
            else:
                others.append(event)
    return digest.report(), others


def main(mode: str, transport: Literal["shm", "unix", "tcp"], unix_path: str, tcp_port: str) -> None:
    hello = Hello(f"peer-{mode}", "expert", os.getpid(), host_id())
    queue_bytes = FLOOD_QUEUE_BYTES if mode == "flood" else DEFAULT_MAX_QUEUED_BYTES
    target = Address(unix_path, "127.0.0.1", int(tcp_port))
    link = dial(target, hello, SECRET, transport, TIMEOUT_S, queue_bytes, RING_BYTES)
    reactor = Reactor()
    reactor.add(link)
    if mode == "deaf":
        sys.stdin.read()
    elif mode == "half":
        pieces, _ = frame_pieces(ECHO, b"never finished", [bytes(100_000)])
        link._pipe.write([pieces[0], pieces[1][:50_000]])
        sys.stdin.read()
    elif mode == "last_words":
        for index in range(100):
            link.send(ECHO, b"%d" % index, bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "flood":
        link.send(REPORT, flood(reactor, link)[0])
    serve(reactor)


def serve(reactor: Reactor) -> None:
    """Echoes and digests until the link is closed; now sleeps at once, now looks out for a while first."""
    digest = Digest()
    rng = random.Random(os.getpid())
    while True:
        for event in reactor.poll(None, is_urgent=rng.random() < 0.5):
            if isinstance(event, Closed):
                return
            if not isinstance(event, Received):
                continue
            message = event.message
            if message.kind == ECHO:
                event.link.send(ECHO, message.meta, message.payload)
            elif message.kind == REPORT:
                event.link.send(REPORT, digest.report())
            else:
                digest.add(message.kind, message.meta, message.payload)


if __name__ == "__main__":
    mode, transport, unix_path, tcp_port = sys.argv[1:]
    main(mode, transport, unix_path, tcp_port)  # type: ignore[arg-type]
