"""Round trips between two processes over each kind of link, and one-way throughput.

Run it from outside the repository root: `python benchmarks/links.py`, with `--rounds N` for more rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from braid.actors.dialing import dial, host_id
from braid.actors.links import Hello, Link
from braid.actors.listener import Listener
from braid.actors.reactor import Closed, Reactor, Received

SECRET = b"only for this benchmark, no secret at all"
TRANSPORTS: tuple[Literal["shm", "unix", "tcp"], ...] = ("shm", "unix", "tcp")
SIZES = (64, 4 << 10, 64 << 10, 1 << 20)
ECHO, SWALLOW = 1, 2


@dataclass(frozen=True)
class Address:
    unix_path: str
    tcp_host: str
    tcp_port: int


def peer(address: Address, transport: Literal["shm", "unix", "tcp"]) -> None:
    reactor = Reactor()
    reactor.add(dial(address, Hello("peer", "benchmark", 1, host_id()), SECRET, transport, timeout_s=30))
    while True:
        for event in reactor.poll(None, is_urgent=True):
            if isinstance(event, Received) and event.message.kind == ECHO:
                event.link.send(ECHO, event.message.meta, event.message.payload)
            elif isinstance(event, Closed):
                return


@contextmanager
def linked_peer(transport: Literal["shm", "unix", "tcp"]) -> Iterator[tuple[Reactor, Link]]:
    with tempfile.TemporaryDirectory() as folder:
        reactor = Reactor()
        path = str(Path(folder) / "socket")
        hello = Hello("bench", "benchmark", 1, host_id())
        listener = Listener(hello, SECRET, path, "127.0.0.1", reactor.add)
        address = Address(path, "127.0.0.1", listener.tcp_port)
        process = get_context("spawn").Process(target=peer, args=(address, transport))
        process.start()
        events = reactor.poll(30)
        while not events:
            events = reactor.poll(30)
        try:
            yield reactor, events[0].link
        finally:  # it ends with its link, and nobody would end it later
            reactor.close()
            process.join()
            listener.close()


def round_trip_us(reactor: Reactor, link: Link, payload: bytes) -> float:
    start = time.perf_counter()
    link.send(ECHO, b"", payload)
    while not any(isinstance(event, Received) for event in reactor.poll(None, is_urgent=True)):
        pass
    return (time.perf_counter() - start) * 1e6


def throughput_gb_s(reactor: Reactor, link: Link, num_bytes: int) -> float:
    """One way in messages of 1 MiB, until the peer has swallowed the last."""
    payload = bytes(1 << 20)
    start = time.perf_counter()
    for _ in range(num_bytes >> 20):
        link.send(SWALLOW, b"", payload)
        while link.queued_bytes:
            reactor.poll(None)
    round_trip_us(reactor, link, b"")
    return num_bytes / (time.perf_counter() - start) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds: int = parser.parse_args().rounds
    print(f"{'link':6}{'bytes':>9}{'min us':>10}{'median us':>12}{'p99 us':>10}")
    for transport in TRANSPORTS:
        with linked_peer(transport) as (reactor, link):
            for size in SIZES:
                payload = bytes(size)
                times = sorted(round_trip_us(reactor, link, payload) for _ in range(rounds))
                p99 = times[int(0.99 * len(times))]
                print(f"{transport:6}{size:>9}{times[0]:>10.1f}{statistics.median(times):>12.1f}{p99:>10.1f}")
            print(f"{transport:6} one way: {throughput_gb_s(reactor, link, 256 << 20):.2f} GB/s")


if __name__ == "__main__":
    main()
