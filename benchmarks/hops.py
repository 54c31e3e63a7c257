"""What an expert hop costs besides computing: from the dispatch to the combined rows, between real processes.

    python benchmarks/hops.py [--workers 1] [--rounds 2000] [--out benchmarks/results/hops.json]

Run it from outside the repository root. One process dispatches as an attention worker does and combines; each expert
worker is a process of its own. A hop is told in parts: serialise (choose owners, lay out, write), wire (both ways, with
reading and waking), queue (at the expert worker until it computes), compute (left out of the sum), combine. `think` is
how long the attention side computes between two hops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from braid.actors.dialing import dial, host_id
from braid.actors.dispatch import RemoteExperts
from braid.actors.expert_host import ExpertHost
from braid.actors.expert_server import ExpertServer
from braid.actors.links import Hello, Link
from braid.actors.listener import Listener
from braid.actors.pipe import Transport
from braid.actors.reactor import Closed, Event, Opened, Reactor
from braid.model.families import ops_for
from braid.model.network_weights import ExpertWeights
from braid.router.expert_map import Owner, assign, build_map

SECRET = b"only for this benchmark, no secret at all"
TRANSPORTS: tuple[Transport, ...] = ("shm", "unix", "tcp")
DTYPE = torch.bfloat16
LAYER = 1


@dataclass(frozen=True)
class Shape:
    """By default the layers of a model with 0.5B parameters."""

    hidden: int = 1024
    width: int = 192
    num_experts: int = 64
    top_k: int = 6


@dataclass(frozen=True)
class Address:
    unix_path: str
    tcp_host: str
    tcp_port: int


@dataclass(frozen=True)
class Hop:
    """Microseconds, and bytes both ways."""

    total: float
    after_dispatch: float  # from the moment that the last of the dispatch was sent
    serialise: float
    wire: float
    queue: float
    compute: float
    combine: float
    bytes_out: int
    bytes_in: int


class Mail:
    """What an endpoint is to its worker."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.is_over = False

    def poll(self, timeout_s: float) -> list[Event]:
        events = self.reactor.poll(timeout_s, is_urgent=True)
        self.is_over |= any(isinstance(event, Closed) for event in events)
        return events

    def spin(self, look: Callable[[int, int], Any]) -> Any:
        return self.reactor.spin(look)

    def defer(self, event: Event) -> None:
        pass


def expert_worker(name: str, experts: list[int], shape: Shape, address: Address, transport: Transport) -> None:
    ops = ops_for(DTYPE)
    ops.set_threads(1)
    torch.manual_seed(0)
    w13 = torch.randn(len(experts), 2 * shape.width, shape.hidden).to(DTYPE)
    w2 = torch.randn(len(experts), shape.hidden, shape.width).to(DTYPE)
    stacks = ops.pack_experts(w13, is_gate_up=True), ops.pack_experts(w2)
    host = ExpertHost({LAYER: ExpertWeights(*stacks, tuple(experts), ops)}, shape.num_experts)
    reactor = Reactor()
    reactor.add(dial(address, Hello(name, "expert", 1, host_id()), SECRET, transport, timeout_s=60))
    mail = Mail(reactor)
    with torch.inference_mode():
        ExpertServer(host, shape.hidden, shape.num_experts, DTYPE).serve(mail, lambda: mail.is_over)


@contextmanager
def expert_workers(num: int, shape: Shape, transport: Transport) -> Iterator[RemoteExperts]:
    owners = [Owner(f"expert-{index}", 1) for index in range(num)]
    replicas = assign(shape.num_experts, [owner.worker for owner in owners], 1)
    expert_map = build_map(1, shape.num_experts, [LAYER], owners, replicas)
    with tempfile.TemporaryDirectory() as folder:
        reactor = Reactor()
        path = str(Path(folder) / "socket")
        listener = Listener(Hello("attention", "both", 1, host_id()), SECRET, path, "127.0.0.1", reactor.add)
        address = Address(path, "127.0.0.1", listener.tcp_port)
        spawn, processes = get_context("spawn"), []
        for index, owner in enumerate(owners):
            held = [e for e, holders in enumerate(expert_map.replicas[LAYER]) if index in holders]
            processes.append(spawn.Process(target=expert_worker, args=(owner.worker, held, shape, address, transport)))
            processes[-1].start()
        links: dict[str, Link] = {}
        while len(links) < num:
            links |= {event.link.peer.name: event.link for event in reactor.poll(60) if isinstance(event, Opened)}
        experts = RemoteExperts(Mail(reactor), shape.num_experts)
        experts.set_map(expert_map, links)
        try:
            yield experts
        finally:  # they end with their links, and nobody would end them later
            reactor.close()
            for process in processes:
                process.join()
            listener.close()


def hops(experts: RemoteExperts, shape: Shape, num_tokens: int, rounds: int, think_s: float) -> Iterator[Hop]:
    ops, generator = ops_for(DTYPE), torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, shape.hidden, generator=generator).to(DTYPE)
    shared, out = torch.randn_like(x), torch.empty_like(x)
    weights = torch.rand(num_tokens, shape.top_k, generator=generator)
    for _ in range(rounds):
        scores = torch.rand(num_tokens, shape.num_experts, generator=generator)
        topk_idx = scores.topk(shape.top_k).indices
        busy_until = time.monotonic() + think_s
        while time.monotonic() < busy_until:
            pass
        before = asdict(experts.counters)
        started = time.monotonic()
        handle = experts.dispatch(LAYER, x, topk_idx)
        asked = list(handle.pending.values())
        rows = experts.collect(handle)
        collected = time.monotonic()
        ops.combine(shared, rows, weights, out=out)
        ended = time.monotonic()
        sent = max(part.sent for part in asked)
        spent = {name: value - before[name] for name, value in asdict(experts.counters).items()}
        parts = {name: spent[f"{name}_s"] / spent["hops"] for name in ("wire", "queue", "compute")}
        times = {
            "total": ended - started - parts["compute"],
            "after_dispatch": ended - sent - parts["compute"],
            "serialise": sent - started,
            "combine": ended - collected,
        } | parts
        if (
            spent["timed"] == spent["hops"] and spent["wire_s"] > 0
        ):  # else we were stopped before we noted when it was sent
            yield Hop(
                **{k: v * 1e6 for k, v in times.items()}, bytes_out=spent["bytes_out"], bytes_in=spent["bytes_in"]
            )


def summary(measured: list[Hop]) -> dict[str, dict[str, float]]:
    columns = {name: [getattr(hop, name) for hop in measured] for name in Hop.__dataclass_fields__}
    return {
        name: {"median": statistics.median(values), "best": min(values), "p90": sorted(values)[9 * len(values) // 10]}
        for name, values in columns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS, choices=TRANSPORTS)
    parser.add_argument("--think-us", type=float, default=200.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape, results = Shape(), []
    ops_for(DTYPE).set_threads(1)
    names = ["total", "after_dispatch", "serialise", "wire", "queue", "combine", "compute"]
    print(f"{'link':6}{'tokens':>7}" + "".join(f"{name:>18}" for name in names) + "   medians (best), us")
    with torch.inference_mode():
        for transport in args.transports:
            with expert_workers(args.workers, shape, transport) as experts:
                for num_tokens in args.tokens:
                    list(hops(experts, shape, num_tokens, 200, args.think_us / 1e6))
                    told = summary(list(hops(experts, shape, num_tokens, args.rounds, args.think_us / 1e6)))
                    figures = "".join(f"{told[name]['median']:>10.1f}{told[name]['best']:>8.1f}" for name in names)
                    print(f"{transport:6}{num_tokens:>7}{figures}")
                    results.append({"transport": transport, "tokens": num_tokens, "us": told})
    if args.out is not None:
        told_shape = asdict(shape) | {"workers": args.workers, "think_us": args.think_us}
        args.out.write_text(json.dumps({"shape": told_shape, "hops": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
