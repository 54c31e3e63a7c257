"""Expert workers in real processes, the first on the host of who asks, which offer pairs over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection

import torch

from braid.actors.links import Hello, Link
from braid.actors.paired_server import PairedServer
from braid.actors.reactor import Reactor
from braid.actors.socket_pipe import SocketPipe
from braid.model.network_weights import PLAIN, ExpertWeights

HOST, CPU = "127.0.0.1", torch.device("cpu")
LONG_S = 120.0
HIDDEN, INNER, TOP_K, NUM_EXPERTS, LAYERS = 32, 16, 2, 8, (1, 2)


def weights(held: tuple[int, ...] = tuple(range(NUM_EXPERTS))) -> Mapping[int, ExpertWeights]:
    """Random experts, the same in every process."""
    generator, made = torch.Generator().manual_seed(0), {}
    for layer in LAYERS:
        w13 = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN, generator=generator).bfloat16()[list(held)]
        w2 = torch.randn(NUM_EXPERTS, HIDDEN, INNER, generator=generator).bfloat16()[list(held)]
        made[layer] = ExpertWeights(PLAIN.pack_experts(w13), PLAIN.pack_experts(w2), held, PLAIN)
    return made


def serve(listener: socket.socket, held: tuple[int, ...], starting: Connection) -> None:
    """An expert worker of whoever comes."""
    starting.send("here")
    torch.set_num_threads(1)
    reactor = Reactor()

    def admit() -> None:
        while True:
            reactor.add(Link(Hello("attention-0", "both", 1, "host-a"), SocketPipe(listener.accept()[0], "unix")))

    threading.Thread(target=admit, daemon=True).start()
    server = PairedServer(weights(held), HIDDEN, NUM_EXPERTS, torch.bfloat16, CPU, HOST, reactor.wake)
    with torch.inference_mode():
        while True:
            server.turn(reactor.poll(0.0 if server.has_jobs else 1.0))


class PairedWorker:
    """`held`: the experts it has."""

    def __init__(self, name: str, held: tuple[int, ...] = tuple(range(NUM_EXPERTS))) -> None:
        self.name = name
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("")  # the kernel chooses
        listener.listen()
        self._address = listener.getsockname()
        context = multiprocessing.get_context("spawn")
        self._starting, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=serve, args=(listener, held, theirs), daemon=True)
        self.process.start()
        listener.close()
        theirs.close()
        self._is_here = False

    def link(self) -> Link:
        """Once it runs: it may take longer to start than a dispatch or a pair is waited for."""
        self._is_here = self._is_here or bool(self._starting.recv())
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self._address)
        host = "host-a" if self.name == "expert-0" else "host-b"
        return Link(Hello(self.name, "expert", 1, host), SocketPipe(sock, "unix"))

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join(LONG_S)
