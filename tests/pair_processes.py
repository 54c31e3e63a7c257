"""Expert workers in real processes that hold one end of a pair, for tests of pairs."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import torch

from braid.actors.nccl_pair import Offer, OfferedPair, join

HOST, CPU = "127.0.0.1", torch.device("cpu")
LONG_S = 30.0


def serve(conn: Connection, name: str) -> None:
    """An expert worker: offers a pair, then sends back twice what comes. `conn` is what a link's messages are."""
    torch.set_num_threads(1)
    offered = OfferedPair("attention-0", HOST, CPU, LONG_S)
    conn.send(offered.offer)
    pair = offered.accept()
    while num_rows := conn.recv():
        rows = torch.empty(num_rows, 16, dtype=torch.bfloat16)
        pair.receive(rows).wait(LONG_S)
        pair.send(rows * 2).wait(LONG_S)
    conn.send(name)


class Peer:
    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name), daemon=True)
        self.process.start()
        theirs.close()
        self.name = name
        self.offer: Offer = self.conn.recv()
        self.pair = join(name, self.offer, HOST, CPU, LONG_S)

    def ask(self, num_rows: int, timeout_s: float = LONG_S) -> torch.Tensor:
        self.conn.send(num_rows)
        rows = torch.arange(num_rows * 16).view(num_rows, 16).to(torch.bfloat16)
        sent, answer = self.pair.send(rows), torch.zeros_like(rows)
        self.pair.receive(answer).wait(timeout_s)
        sent.wait(timeout_s)
        assert torch.equal(answer, rows * 2)
        return answer

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.pair.close()
        self.process.kill()
        self.process.join(LONG_S)
