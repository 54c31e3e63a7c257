"""When the rows of each layer leave, in the virtual time of a device that computes behind the host."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from scripted_engines import CONFIG, Front, Worker, connect

from braid.actors.cache_memory import HostMemory, Reading, Runs
from braid.actors.kv_sender import KvSender, LayerSender, Span
from braid.actors.links import Hello, Link
from braid.actors.messages import KV_LAYER, Kind
from braid.actors.reactor import Reactor, Received
from braid.actors.sequence import Sequence
from braid.actors.socket_pipe import SocketPipe
from braid.model.kv_cache import LatentCache
from braid.model.sampling_params import SamplingParams

NUM_LAYERS, NUM_ROWS = 6, 40


@dataclass
class Device:
    """To launch a layer takes the host 1, to compute it the device `lag`; to wait for rows takes as long as they do."""

    memory: HostMemory
    link: Link
    lag: int
    lost_at: int = 1 << 30  # when a kernel tells of a loss
    now: int = 0
    row_bytes: int = CONFIG.latent_dim * 4
    waits: list[int] = field(default_factory=list)  # messages that had left when the host began to wait

    def read(self, layer: int, runs: Runs) -> Reading:
        self.now += 1
        return OnItsWay(self, (layer + 1) * self.lag, self.memory.read(layer, runs))

    def write(self, layer: int, runs: Runs, payload: memoryview) -> None:
        raise AssertionError("nothing comes in")

    def is_whole(self) -> bool:
        return self.now < self.lost_at


@dataclass
class OnItsWay:
    device: Device
    due: int
    reading: Reading

    def is_there(self) -> bool:
        return self.device.now >= self.due

    def pieces(self) -> list[memoryview]:
        if not self.is_there():
            self.device.waits.append(self.device.link.messages_sent)
            self.device.now = self.due
        return self.reading.pieces()


class Transfer:
    """Rows of one sequence over a link whose other end is here too, and is read by `heard`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.link = Link(Hello("b", "decode", 1, "host"), SocketPipe(ours, "unix"))
        self.reactor = Reactor()
        self.reactor.add(Link(Hello("a", "prefill", 1, "host"), SocketPipe(theirs, "unix")))
        self.reactor.poll(0)
        cache = LatentCache(CONFIG, 2, torch.float32, NUM_LAYERS)
        for layer, rows in enumerate(cache.layers):
            rows.fill_(layer)
        self.memory = HostMemory(cache)

    def sender(self, lag: int) -> tuple[LayerSender, Device]:
        device = Device(self.memory, self.link, lag)
        params = SamplingParams(max_tokens=10)
        sequence = Sequence("r", "front-0", "b", [5] * NUM_ROWS, NUM_ROWS, params, {}, 0.0)
        span = Span(sequence, self.link, 0, NUM_ROWS, [(64, NUM_ROWS)])
        return LayerSender(KvSender(device, NUM_LAYERS, True), [span], device.is_whole), device

    def heard(self) -> list[int]:
        """The layers that have come since it was asked last; their rows are looked at."""
        layers = []
        for event in self.reactor.poll(0):
            if isinstance(event, Received) and event.message.kind == Kind.KV_LAYER:
                layer = KV_LAYER.unpack(event.message.meta)[0]
                rows = torch.frombuffer(event.message.payload, dtype=torch.float32)
                assert rows.shape == (NUM_ROWS * CONFIG.latent_dim,)
                assert rows.eq(layer).all()
                layers.append(layer)
        return layers


@pytest.fixture
def transfer() -> Iterator[Transfer]:
    made = Transfer()
    yield made
    made.link.close()
    made.reactor.close()


def test_rows_of_the_host_leave_at_once(transfer: Transfer) -> None:
    sender, device = transfer.sender(lag=0)
    for layer in range(NUM_LAYERS):
        sender(layer)
        assert transfer.heard() == [layer]
    sender.finish()
    assert transfer.heard() == device.waits == []


def test_layers_leave_as_the_device_computes_them_and_nobody_waits_before_all_are_launched(transfer: Transfer) -> None:
    sender, device = transfer.sender(lag=2)
    came = []
    for layer in range(NUM_LAYERS):
        sender(layer)
        came.append(transfer.heard())
    assert came == [[], [0], [], [1], [], [2]]
    assert device.waits == []
    sender.finish()
    assert transfer.heard() == [3, 4, 5]
    assert device.waits == [3, 4, 5]  # when the host began to wait for a layer, all before it had left


@pytest.mark.parametrize("lost_at", range(2, 15))
def test_nothing_leaves_after_a_loss_and_no_layer_twice(transfer: Transfer, lost_at: int) -> None:
    sender, device = transfer.sender(lag=2)
    device.lost_at = lost_at
    for layer in range(NUM_LAYERS):
        sender(layer)
    sender.finish()
    before = transfer.heard()
    assert before == list(range(min((lost_at - 1) // 2, NUM_LAYERS)))
    device.now, device.lost_at = 0, 1 << 30
    for layer in range(NUM_LAYERS):
        sender(layer)
    sender.finish()
    assert before + transfer.heard() == list(range(NUM_LAYERS))


def test_what_a_link_had_no_room_for_goes_on_with_the_next_layer(transfer: Transfer) -> None:
    transfer.link.send(Kind.LOAD, bytes(1 << 16), bytes(4 << 20))
    assert transfer.link.queued_bytes
    came = []
    for _ in range(200):
        sender, _ = transfer.sender(lag=0)
        sender(0)
        came += transfer.heard()
        if not transfer.link.queued_bytes:
            break
    assert not transfer.link.queued_bytes
    assert len(came) > 0


class SlowDevice:
    """Worker `a`, whose device computes long after it was asked to, with a prompt that goes on at `b`."""

    def __init__(self) -> None:
        self.front, self.a, self.b = Front(), Worker("a"), Worker("b")
        connect(self.a, self.front)
        connect(self.b, self.front)
        self.link, _ = connect(self.a, self.b)
        memory = self.a.requests.handovers.sender.memory
        assert isinstance(memory, HostMemory)
        self.device = self.a.requests.handovers.sender.memory = Device(memory, self.link, lag=1000)
        for side in (self.a, self.b, self.front):
            side.listen()
        self.front.submit("a", "b", NUM_ROWS, SamplingParams(max_tokens=2, temperature=0.0))
        self.a.listen()
        self.before = self.link.messages_sent

    @property
    def num_sent(self) -> int:
        num_sent: int = self.link.messages_sent - self.before
        return num_sent


@pytest.fixture
def slow() -> Iterator[SlowDevice]:
    made = SlowDevice()
    yield made
    for side in (made.a, made.b, made.front):
        side.reactor.close()


def test_an_engine_sends_what_a_device_has_computed_before_it_asks_for_tokens(slow: SlowDevice) -> None:
    sent = []

    def is_settled() -> bool:
        sent.append(slow.num_sent)
        return True

    slow.a.experts.may_redo, slow.a.experts.is_settled = True, is_settled
    slow.a.turn()
    assert sent == [CONFIG.num_hidden_layers]
    assert slow.device.waits == [slow.before, slow.before + 1]


def test_rows_of_a_step_that_raised_stay_where_they_are(slow: SlowDevice) -> None:
    slow.a.model.defect = "one bad step"
    slow.a.turn()
    slow.a.model.defect = None
    slow.a.assert_idle()
    assert slow.num_sent == 1  # KV_ABORT
    slow.a.turn()
    assert slow.num_sent == 1
    slow.b.listen()
    slow.b.assert_empty()
