"""Expert workers in processes of their own that share device memory with an attention worker's end, which is ours."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braid.actors.death_watch import DeathWatch
from braid.actors.device_experts import POLLS, DeviceExperts
from braid.actors.device_server import DeviceServer
from braid.actors.dialing import dial, host_id
from braid.actors.dispatch import RemoteExperts
from braid.actors.endpoint import Endpoint
from braid.actors.expert_server import ExpertServer
from braid.actors.links import Hello, Link
from braid.actors.mail_peers import MailPeer
from braid.actors.mailbox import Box, BoxShape
from braid.actors.reactor import Event, Reactor
from braid.actors.settings import WorkerSettings
from braid.actors.staging import StagedExperts, StagedHost
from braid.actors.view import WorkerInfo
from braid.model.experts import LocalExperts
from braid.model.network_weights import ExpertWeights
from braid.model.triton_ops import TritonOps
from braid.router.expert_map import ExpertMap, Owner, assign, build_map

SECRET = b"the secret of one measurement, 32 b"
START_S = 400.0  # ends what waits in vain: where kernels are interpreted a start takes a minute


@dataclass(frozen=True, slots=True)
class Experts:
    """Random experts, the same in every process."""

    hidden: int
    inner: int
    top_k: int
    num_experts: int
    layers: tuple[int, ...]

    def weights(self, expert_ids: tuple[int, ...], device: torch.device) -> dict[int, ExpertWeights]:
        generator, ops, held = torch.Generator().manual_seed(0), TritonOps(device), {}
        for layer in self.layers:
            w13 = torch.randn(self.num_experts, 2 * self.inner, self.hidden, generator=generator).bfloat16()
            w2 = torch.randn(self.num_experts, self.hidden, self.inner, generator=generator).bfloat16()
            mine = list(expert_ids)
            packed = ops.pack_experts(w13[mine].to(device)), ops.pack_experts(w2[mine].to(device))
            held[layer] = ExpertWeights(*packed, expert_ids, ops)
        return held

    def local(self, device: torch.device) -> LocalExperts:
        return LocalExperts(self.weights(tuple(range(self.num_experts)), device))

    def batch(self, rows: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.stack([torch.randperm(self.num_experts, generator=generator)[: self.top_k] for _ in range(rows)])
        return torch.randn(rows, self.hidden, generator=generator).bfloat16().to(device), ids.to(device)

    def map(self, names: list[str], replicas: int, epoch: int = 1) -> ExpertMap:
        owners = [Owner(name, 1) for name in names]
        return build_map(epoch, self.num_experts, self.layers, owners, assign(self.num_experts, names, replicas))


def _serve(
    conn: Connection, settings: WorkerSettings, experts: Experts, device_type: str, prepare: Callable[[], None] | None
) -> None:
    """Until the other end of the pipe is closed."""
    if prepare is not None:
        prepare()
    device = _device(device_type)
    held = experts.weights(tuple(range(experts.num_experts)), device)
    host = StagedHost(held, experts.num_experts)
    server = ExpertServer(host, experts.hidden, experts.num_experts, torch.bfloat16)
    endpoint = Endpoint(settings)
    mail = DeviceServer(server, held, experts.num_experts, experts.hidden, experts.top_k, device)

    def serve() -> None:
        held[experts.layers[0]].ops.set_threads(1, None)
        with torch.inference_mode():
            mail.serve(endpoint, lambda: endpoint.stopping)

    endpoint.start(serve)
    conn.send(endpoint.info)
    while True:
        try:
            conn.recv()
        except EOFError:
            break
        endpoint.check()
        conn.send(dict(server.counts))
    endpoint.stop()


def _device(device_type: str) -> torch.device:
    if device_type == "cuda":
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    return torch.device("cpu")


class ExpertProcess:
    """Holds all experts. `prepare` runs first in the process; anything that can be pickled by name."""

    def __init__(
        self, name: str, experts: Experts, run_dir: Path, device_type: str, prepare: Callable[[], None] | None = None
    ) -> None:
        settings = WorkerSettings(
            "mail", name, "expert", 1, "node", "none", "bfloat16", SECRET, str(run_dir), "127.0.0.1", "auto", 1
        )
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        arguments = (theirs, settings, experts, device_type, prepare)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
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
        assert self._conn.poll(START_S), f"{self.name} did not answer in {START_S:.0f} s"
        return self._conn.recv()


class Attention:
    """One attention worker's end: links to all expert processes, and both ways over them."""

    def __init__(
        self,
        processes: list[ExpertProcess],
        experts: Experts,
        shape: BoxShape,
        device_type: str,
        name: str = "attention-0",
        polls: int = POLLS,
    ) -> None:
        self._watch = DeathWatch(self._bury)
        self.reactor = Reactor(self._watch)
        self.spin = self.reactor.spin
        ops = TritonOps(_device(device_type))
        self.remote = RemoteExperts(self, experts.num_experts)
        staged = StagedExperts(self.remote, ops)
        self.experts = DeviceExperts(staged, shape, host_id(), ops.device, ops.tensor, polls)
        self.links: dict[str, Link] = {}
        for process in processes:
            link = dial(process.info, Hello(name, "both", 1, host_id()), SECRET, "unix", START_S)
            self.links[process.name] = link
            self.reactor.add(link)

    def _bury(self, link: Link) -> None:
        self.experts.bury(link)

    def set_map(self, expert_map: ExpertMap) -> None:
        self.remote.set_map(expert_map, self.links)
        self.experts.set_map(expert_map, self.links)

    def share(self, expert_map: ExpertMap) -> None:
        """Swaps to the map, and waits until all its owners share memory with us."""
        self.set_map(expert_map)
        self.wait(lambda: all(peer is not None and peer.has_mail for peer in self.peers))

    def run(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """One pass, and again as long as it loses rows. [M, k, H]."""
        while True:
            self.experts.phase = 0
            rows = self.experts.collect(self.experts.dispatch(layer, x, ids)).clone()
            if self.experts.is_settled():
                return rows

    def poll(self, timeout_s: float) -> list[Event]:
        events: list[Event] = self.reactor.poll(min(timeout_s, 1.0))
        return events

    def defer(self, event: Event) -> None:
        self.experts.hear(event)

    @property
    def peers(self) -> list[MailPeer | None]:
        """In the order of the map's owners."""
        assert self.experts._peers is not None
        return self.experts._peers._owners

    def box(self, owner: int) -> Box:
        peer = self.peers[owner]
        assert peer is not None
        assert peer.box is not None
        return peer.box

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not until():
            assert time.monotonic() < deadline, f"waited {START_S:.0f} s"
            for event in self.poll(0.01):
                self.experts.hear(event)

    def close(self) -> None:
        self.reactor.close()
        self._watch.close()
