"""Expert workers in real processes on links of another host's, which offer pairs over gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Mapping

import torch

from braid.actors.links import Hello, Link
from braid.actors.paired_server import PairedServer
from braid.actors.reactor import Reactor
from braid.actors.socket_pipe import SocketPipe
from braid.model.network_weights import PLAIN, ExpertWeights

HOST, CPU = "127.0.0.1", torch.device("cpu")
LONG_S = 30.0
HIDDEN, INNER, TOP_K, NUM_EXPERTS, LAYERS = 32, 16, 2, 8, (1, 2)


def weights(held: tuple[int, ...] = tuple(range(NUM_EXPERTS))) -> Mapping[int, ExpertWeights]:
    """Random experts, the same in every process."""
    generator, made = torch.Generator().manual_seed(0), {}
    for layer in LAYERS:
        w13 = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN, generator=generator).bfloat16()[list(held)]
        w2 = torch.randn(NUM_EXPERTS, HIDDEN, INNER, generator=generator).bfloat16()[list(held)]
        made[layer] = ExpertWeights(PLAIN.pack_experts(w13), PLAIN.pack_experts(w2), held, PLAIN)
    return made


def serve(sock: socket.socket, held: tuple[int, ...]) -> None:
    """An expert worker, as long as its link lasts."""
    torch.set_num_threads(1)
    link = Link(Hello("attention-0", "both", 1, "host-a"), SocketPipe(sock, "unix"))
    reactor = Reactor()
    reactor.add(link)
    server = PairedServer(weights(held), HIDDEN, NUM_EXPERTS, torch.bfloat16, CPU, HOST, reactor.wake)
    with torch.inference_mode():
        while link.closed is None:
            server.turn(reactor.poll(0.0 if server.has_jobs else 1.0))


class PairedWorker:
    def __init__(self, name: str, attention: Reactor, held: tuple[int, ...] = tuple(range(NUM_EXPERTS))) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, held), daemon=True)
        self.process.start()
        theirs.close()
        self.link = Link(Hello(name, "expert", 1, "host-b"), SocketPipe(ours, "unix"))
        attention.add(self.link)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(LONG_S)
