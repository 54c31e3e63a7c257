"""The network over expert servers and real links: the bits of local experts, however cut, and through a death.

Also with rows that are fetched from where the network computes and brought back there, as those of a GPU are.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from small_models import FAMILIES, SmallModel, shuffled_table, small_model

from braid.actors.dispatch import RemoteExperts
from braid.actors.expert_host import ExpertHost
from braid.actors.expert_server import ExpertServer
from braid.actors.links import Hello, Link
from braid.actors.pipe import Pipe
from braid.actors.reactor import Closed, Event, Opened, Reactor
from braid.actors.shm_setup import receive_rings, send_rings
from braid.actors.socket_pipe import SocketPipe
from braid.actors.staging import StagedExperts, StagedHost
from braid.model.deepseek import Batch
from braid.model.experts import ExpertBackend, LocalExperts
from braid.model.mla import Segment
from braid.model.triton_ops import TritonOps
from braid.router.expert_map import Owner, assign, build_map

triton_interpreter.repair()

NAMES = ["expert-0", "expert-1"]
RING_BYTES = 64 << 10  # less than the largest dispatch


def pipes(transport: str) -> tuple[Pipe, Pipe]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if transport == "unix":
        return SocketPipe(ours, "unix"), SocketPipe(theirs, "unix")
    return send_rings(ours, RING_BYTES), receive_rings(theirs, time.monotonic() + 5)


class Server:
    """Serves whenever the attention side reads its mail; dies after `life` turns with something to do."""

    def __init__(self, name: str, small: SmallModel, attention: Reactor, transport: str, is_staged: bool) -> None:
        near, far = pipes(transport)
        self.link = Link(Hello(name, "expert", 1, "host"), near)
        self.far = Link(Hello("attention", "both", 1, "host"), far)
        self.reactor = Reactor()
        self.reactor.add(self.far)
        opened = self.reactor.poll(0)
        attention.add(self.link)
        self.is_direct = transport == "direct"
        num_experts = small.config.n_routed_experts or 0
        host = (StagedHost if is_staged else ExpertHost)(small.experts, num_experts)
        self.server = ExpertServer(host, small.config.hidden_size, num_experts, small.weights.norm.dtype)
        self.server.turn(opened)
        self.life = 1 << 30

    def spin(self, look: Callable[[int, int], Any]) -> Any:
        found = look(self.reactor.fileno(), 0)
        return None if isinstance(found, int) else found

    def serve(self) -> None:
        if self.is_direct and self.life and self.server._direct.turn(self):
            self.life -= 1
            return
        events = self.reactor.poll(0)
        self.life -= bool(events)
        if self.life < 0:
            self.far.close("dies")
        else:
            self.server.turn(events)


class Post:
    def __init__(self, small: SmallModel, transport: str, is_staged: bool = False) -> None:
        self.is_staged = is_staged
        self.reactor = Reactor()
        self.servers = [Server(name, small, self.reactor, transport, is_staged) for name in NAMES]
        assert all(isinstance(event, Opened) for event in self.reactor.poll(0))
        self.deferred: list[Event] = []

    def poll(self, timeout_s: float) -> list[Event]:
        for server in self.servers:
            server.serve()
        events: list[Event] = self.reactor.poll(min(timeout_s, 0.01))
        return events

    def spin(self, look: Callable[[int, int], Any]) -> Any:
        for server in self.servers:
            server.serve()
        return self.reactor.spin(look)

    def defer(self, event: Event) -> None:
        self.deferred.append(event)

    def close(self) -> None:
        for reactor in (self.reactor, *(server.reactor for server in self.servers)):
            reactor.close()


@pytest.fixture(params=[(name, dtype) for name in FAMILIES for dtype in (torch.float32, torch.bfloat16)], ids=str)
def small(request: pytest.FixtureRequest) -> SmallModel:
    name, dtype = request.param
    made: SmallModel = small_model("v3", dtype, FAMILIES[name])
    return made


@pytest.fixture(params=["shm", "direct", "unix", "shm, staged"])
def post(request: pytest.FixtureRequest, small: SmallModel) -> Iterator[Post]:
    transport, _, how = request.param.partition(", ")
    made = Post(small, transport, is_staged=how == "staged")
    yield made
    made.close()


def remote(post: Post, small: SmallModel, replicas: int) -> RemoteExperts:
    num_experts = small.config.n_routed_experts or 0
    made = RemoteExperts(post, num_experts)
    layers = sorted(small.experts)
    owners = [Owner(name, 1) for name in NAMES]
    expert_map = build_map(1, num_experts, layers, owners, assign(num_experts, NAMES, replicas))
    made.set_map(expert_map, {server.link.peer.name: server.link for server in post.servers})
    return made


def backend(post: Post, small: SmallModel, experts: RemoteExperts) -> ExpertBackend:
    return StagedExperts(experts, small.weights.ops) if post.is_staged else experts


def batch(small: SmallModel) -> Batch:
    """A few decoding rows behind their prompts, and a prompt."""
    tables = shuffled_table()
    segments = [Segment(0, 70, tables[:2], absorbed=False), Segment(70, 3, tables[:2], absorbed=True)]
    segments.append(Segment(0, 66, tables[2:4], absorbed=False))
    return Batch(small.token_ids(139), segments, torch.arange(139))


def test_remote_experts_give_the_bits_of_local_ones_however_the_batch_is_cut(post: Post, small: SmallModel) -> None:
    local = small.network(LocalExperts(small.experts)).forward(batch(small))
    experts = remote(post, small, replicas=1)
    for count in (1, 2, 3, 1, 4):
        output = small.network(backend(post, small, experts)).forward(batch(small), micro_batches=count)
        assert torch.equal(output.logits, local.logits)
        assert torch.equal(output.hidden, local.hidden)
        assert experts.take_failed() == {}
    assert experts.counters.hops > 0


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("life", [0, 1, 3])
def test_a_worker_dies_between_micro_batches_and_no_bit_changes(
    post: Post, small: SmallModel, count: int, life: int
) -> None:
    local = small.network(LocalExperts(small.experts)).forward(batch(small))
    experts = remote(post, small, replicas=2)
    post.servers[0].life = life
    for _ in range(3):
        output = small.network(backend(post, small, experts)).forward(batch(small), micro_batches=count)
        assert torch.equal(output.logits, local.logits)
        assert experts.take_failed() == {}
    assert [type(event) for event in post.deferred] == [Closed]
    assert experts.counters.resent > 0


def test_rows_of_a_step_that_broke_off_are_never_sent(post: Post, small: SmallModel) -> None:
    experts = remote(post, small, replicas=1)
    staged = StagedExperts(experts, small.weights.ops)
    x = torch.zeros(2, small.config.hidden_size, dtype=small.weights.norm.dtype)
    staged.dispatch(min(small.experts), x, torch.zeros(2, 4, dtype=torch.int64))
    assert staged.take_failed() == {}
    assert experts.counters.hops == 0
    local = small.network(LocalExperts(small.experts)).forward(batch(small))
    assert torch.equal(small.network(staged).forward(batch(small)).logits, local.logits)


def test_rows_of_the_kernels_for_gpus_have_the_bits_of_local_ones() -> None:
    small = small_model("v3", torch.bfloat16, TritonOps(torch.device("cpu"), None))
    post = Post(small, "shm", is_staged=True)
    staged = StagedExperts(remote(post, small, replicas=1), small.weights.ops)
    local = LocalExperts(small.experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, small.config.hidden_size, generator=generator).bfloat16()
    num_experts, top_k = small.config.n_routed_experts or 0, small.config.num_experts_per_tok or 0
    topk_idx = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in x])
    layer = max(small.experts)
    rows = staged.collect(staged.dispatch(layer, x, topk_idx))
    assert torch.equal(rows, local.collect(local.dispatch(layer, x, topk_idx)))
    post.close()
