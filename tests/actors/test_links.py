"""Links between real processes over every transport: order, integrity, bounds and the end of a peer."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest
import torch
from link_peer import (
    ECHO,
    FLOOD,
    FLOOD_MESSAGES,
    FLOOD_QUEUE_BYTES,
    REPORT,
    RING_BYTES,
    TIMEOUT_S,
    TRANSPORTS,
    Digest,
    LinkHost,
    flood,
)

from braid.actors.links import DEFAULT_MAX_QUEUED_BYTES, Link, LinkClosed, LinkFull

DEATH_S = 0.1
MOST_DEATHS = 20
SIZES = (0, 1, 17, 4096, 65_536, RING_BYTES - 1, RING_BYTES, RING_BYTES + 1, 3 * RING_BYTES + 5, 20_000_000)
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)
Transport = Literal["shm", "unix", "tcp"]


@pytest.fixture
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LinkHost]:
    """Its parameter, where a test gives one, bounds the queues."""
    made = LinkHost(tmp_path, getattr(request, "param", DEFAULT_MAX_QUEUED_BYTES))
    yield made
    made.close()


@every_transport
def test_an_echo_of_every_size(host: LinkHost, transport: Transport) -> None:
    link = host.start("echo", transport).link
    assert link.transport == transport
    assert link.peer.name == "peer-echo"
    for size in SIZES:
        payload = random.Random(size).randbytes(size)
        link.send(ECHO, b"size %d" % size, payload)
        host.until(lambda: bool(host.received(link)), f"the echo of {size} bytes")
        (answer,) = (event.message for event in host.received(link))
        assert (answer.kind, answer.meta) == (ECHO, b"size %d" % size)
        assert answer.payload == payload
        host.events.clear()
    assert link.messages_sent == link.messages_received == len(SIZES)
    assert link.queued_bytes == 0


@every_transport
def test_thousands_of_mixed_messages_arrive_whole_and_in_order(host: LinkHost, transport: Transport) -> None:
    link = host.start("digest", transport).link
    rng = random.Random(1)
    digest = Digest()
    for index in range(4000):
        parts = [rng.randbytes(int(2 ** rng.uniform(0, 15)) - 1) for _ in range(rng.randrange(4))]
        buffers = [bytearray(part) for part in parts]
        kind = 10 + index % 50_000
        link.send(kind, b"%d" % index, *(memoryview(buffer) for buffer in buffers))
        for buffer in buffers:
            buffer[:] = b"\xee" * len(buffer)  # the sender may reuse its memory at once
        digest.add(kind, b"%d" % index, b"".join(parts))
        if index % 100 == 0:
            host.events += host.reactor.poll(0)
    link.send(REPORT, b"")
    host.until(lambda: bool(host.received(link)), "the digest")
    assert host.received(link)[0].message.meta == digest.report()


@every_transport
@pytest.mark.parametrize("host", [FLOOD_QUEUE_BYTES], indirect=True)
def test_both_directions_saturated_at_once(host: LinkHost, transport: Transport) -> None:
    link = host.start("flood", transport).link
    mine, others = flood(host.reactor, link)
    host.events += others
    host.until(lambda: bool(host.received(link)), "the digest")
    assert host.received(link)[0].message.meta == mine
    assert mine.startswith(b"%d " % FLOOD_MESSAGES)


def fill(link: Link, payload: bytes) -> None:
    with suppress(LinkFull):
        while True:
            link.send(FLOOD, b"", payload)


@every_transport
@pytest.mark.parametrize("host", [1_000_000], indirect=True)
def test_a_peer_that_does_not_read_fills_a_bounded_queue(host: LinkHost, transport: Transport) -> None:
    peer = host.start("deaf", transport)
    fill(peer.link, bytes(100_000))
    accepted = peer.link.messages_sent
    with pytest.raises(LinkFull, match="peer-deaf reads too slowly"):
        peer.link.send(FLOOD, b"", bytes(100_000))
    assert peer.link.queued_bytes <= 1_000_000
    assert peer.link.messages_sent == accepted
    with pytest.raises(ValueError, match="never fit max_queued_bytes 1000000"):
        peer.link.send(FLOOD, b"", bytes(1_000_001))
    peer.kill()
    host.until_closed(peer.link)


def is_proved(delays: list[float]) -> bool:
    """Three deaths, and one at least noticed in time: each of the others may have waited for a busy machine."""
    assert len(delays) < MOST_DEATHS, f"none was noticed within {DEATH_S} s: {delays}"
    return len(delays) >= 3 and min(delays) < DEATH_S


@every_transport
def test_a_killed_peer_is_noticed_within_100_ms_and_no_other_link_suffers(host: LinkHost, transport: Transport) -> None:
    bystander = host.start("echo", transport).link
    delays: list[float] = []
    while not is_proved(delays):
        victim = host.start("deaf", transport)
        victim.kill()
        victim.process.wait()  # the system may take its time over a death: ours begins when it is done
        start = time.monotonic()
        reason = host.until_closed(victim.link)
        delays.append(time.monotonic() - start)
        assert reason.startswith("peer-deaf is gone: ")
        with pytest.raises(LinkClosed, match="peer-deaf is gone"):
            victim.link.send(ECHO, b"")
    bystander.send(ECHO, b"alive")
    host.until(lambda: bool(host.received(bystander)), "the bystander")
    assert bystander.closed is None
    assert host.reactor.links() == [bystander]


def python_compute() -> None:
    sum(index * index for index in range(100_000))


def torch_compute() -> None:
    torch.mm(torch.ones(700, 700), torch.ones(700, 700))


@pytest.mark.parametrize(
    ("transport", "compute"),
    [("shm", torch_compute), ("unix", torch_compute), ("tcp", torch_compute), ("shm", python_compute)],
)
def test_death_is_noticed_while_the_owner_computes(
    host: LinkHost, transport: Transport, compute: Callable[[], None]
) -> None:
    delays: list[float] = []
    while not is_proved(delays):
        victim = host.start("deaf", transport)
        killed_at: list[float] = []

        def kill(victim=victim, killed_at=killed_at) -> None:  # type: ignore[no-untyped-def]
            victim.kill()
            victim.process.wait()
            killed_at.append(time.monotonic())

        killer = threading.Thread(target=kill)
        killer.start()
        deadline = time.monotonic() + TIMEOUT_S
        while len(host.deaths) == len(delays):
            assert time.monotonic() < deadline, "the death was not noticed"
            compute()
        killer.join()
        link, died_at = host.deaths[-1]
        assert link is victim.link
        delays.append(died_at - killed_at[0])
        with pytest.raises(LinkClosed):
            link.send(ECHO, b"")
        host.until_closed(link)
    assert len(host.deaths) == len(delays)


@every_transport
def test_half_a_message_and_then_death(host: LinkHost, transport: Transport) -> None:
    peer = host.start("half", transport)
    host.until(lambda: peer.link._reader.is_mid_frame(), "half a message")
    peer.kill()
    assert host.until_closed(peer.link).startswith("peer-half is gone")
    assert not host.received(peer.link)


@every_transport
def test_what_a_peer_said_before_it_died_is_heard(host: LinkHost, transport: Transport) -> None:
    peer = host.start("last_words", transport)
    peer.process.wait()
    host.until_closed(peer.link)
    assert [event.message.meta for event in host.received(peer.link)] == [b"%d" % index for index in range(100)]
    assert host.events[-1].link is peer.link
