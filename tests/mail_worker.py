"""Expert workers in processes of their own, their kernels interpreted, and an attention worker's end of their links."""

from __future__ import annotations

import triton_interpreter  # before the first kernel is declared

# isort: split
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from braid.actors.death_watch import DeathWatch
from braid.actors.device_experts import DeviceExperts
from braid.actors.device_server import DeviceServer
from braid.actors.dialing import dial, host_id
from braid.actors.dispatch import RemoteExperts
from braid.actors.endpoint import Endpoint
from braid.actors.expert_host import ExpertHost
from braid.actors.expert_server import ExpertServer
from braid.actors.links import Hello, Link
from braid.actors.mail_peers import MailPeer
from braid.actors.mailbox import Box, BoxShape
from braid.actors.reactor import Event, Reactor
from braid.actors.settings import WorkerSettings
from braid.actors.view import WorkerInfo
from braid.model.network_weights import ExpertWeights
from braid.model.triton_ops import TritonOps
from braid.router.expert_map import ExpertMap, Owner, assign, build_map

triton_interpreter.repair()
CPU = torch.device("cpu")
SECRET = b"the secret of a test cluster, 32 b"
HIDDEN, INNER, TOP_K, NUM_EXPERTS, LAYERS = 32, 16, 2, 4, (1, 3)
SHAPE = BoxShape(max_rows=4, top_k=TOP_K, hidden=HIDDEN, slots=2)
START_S = 120.0


def weights(expert_ids: tuple[int, ...]) -> dict[int, ExpertWeights]:
    generator, ops = torch.Generator().manual_seed(0), TritonOps(CPU)
    held = {}
    for layer in LAYERS:
        w13 = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN, generator=generator).bfloat16()
        w2 = torch.randn(NUM_EXPERTS, HIDDEN, INNER, generator=generator).bfloat16()
        mine = list(expert_ids)
        held[layer] = ExpertWeights(ops.pack_experts(w13[mine]), ops.pack_experts(w2[mine]), expert_ids, ops)
    return held


def _serve(conn: Connection, settings: WorkerSettings) -> None:
    """Until the other end of the pipe is closed."""
    held = weights(settings.expert_ids or ())
    server = ExpertServer(ExpertHost(held, NUM_EXPERTS), HIDDEN, NUM_EXPERTS, torch.bfloat16)
    endpoint = Endpoint(settings)
    mail = DeviceServer(server, held, NUM_EXPERTS, HIDDEN, TOP_K, CPU)
    endpoint.start(lambda: mail.serve(endpoint, lambda: endpoint.stopping))
    conn.send(endpoint.info)
    while True:
        try:
            conn.recv()
        except EOFError:
            break
        endpoint.check()
        conn.send(dict(server.counts))
    endpoint.stop()


class ExpertProcess:
    def __init__(self, name: str, expert_ids: tuple[int, ...], run_dir: Path) -> None:
        settings = WorkerSettings(
            "test", name, "expert", 1, "node", "none", "bfloat16", SECRET, str(run_dir), "127.0.0.1", "auto", 1,
            expert_ids=expert_ids,
        )  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.name = name
        self._info: WorkerInfo | None = None

    @property
    def info(self) -> WorkerInfo:
        if self._info is None:
            self._info = self._answer()
        assert self._info is not None
        return self._info

    def counts(self) -> dict[str, int]:
        """What it has served so far."""
        self._conn.send(None)
        counts: dict[str, int] = self._answer()
        return counts

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:  # stopped, not only told to stop
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def close(self) -> None:
        self._conn.close()
        self.process.join(START_S)
        assert self.process.exitcode is not None, f"{self.name} did not end"

    def _answer(self) -> Any:
        assert self._conn.poll(START_S), f"{self.name} did not answer"
        return self._conn.recv()


class Attention:
    """One attention worker's end: links to all experts, and both ways over them."""

    def __init__(self, experts: list[ExpertProcess], name: str = "attention-0", shape: BoxShape = SHAPE) -> None:
        self._watch = DeathWatch(self._bury)
        self.reactor = Reactor(self._watch)
        self.remote = RemoteExperts(self, NUM_EXPERTS)
        self.device = DeviceExperts(self.remote, shape, host_id(), CPU, lambda x: x, polls=1 << 40)
        self.links: dict[str, Link] = {}
        for expert in experts:
            link = dial(expert.info, Hello(name, "both", 1, host_id()), SECRET, "unix", 10.0)
            self.links[expert.name] = link
            self.reactor.add(link)

    def _bury(self, link: Link) -> None:
        self.device.bury(link)

    def set_map(self, expert_map: ExpertMap) -> None:
        self.remote.set_map(expert_map, self.links)
        self.device.set_map(expert_map, self.links)

    def poll(self, timeout_s: float) -> list[Event]:
        events: list[Event] = self.reactor.poll(min(timeout_s, 1.0))
        return events

    def defer(self, event: Event) -> None:
        self.device.hear(event)

    @property
    def peers(self) -> list[MailPeer | None]:
        """In the order of the map's owners."""
        assert self.device._peers is not None
        return self.device._peers._owners

    def box(self, owner: int) -> Box:
        peer = self.peers[owner]
        assert peer is not None
        assert peer.box is not None
        return peer.box

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not until():
            assert time.monotonic() < deadline, "waited too long"
            for event in self.poll(0.01):
                self.device.hear(event)

    def close(self) -> None:
        self.reactor.close()
        self._watch.close()


def expert_map(names: list[str], replicas: int, epoch: int = 1) -> ExpertMap:
    owners = [Owner(name, 1) for name in names]
    return build_map(epoch, NUM_EXPERTS, LAYERS, owners, assign(NUM_EXPERTS, names, replicas))
