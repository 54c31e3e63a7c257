"""Expert workers in real processes that hold one end of a pair, for tests of pairs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch

from braid.actors.links import LinkClosed
from braid.actors.nccl_pair import ATTENTION, EXPERT, RowPair, join
from braid.actors.pair_store import PairStore

HOST, CPU = "127.0.0.1", torch.device("cpu")
LONG_S = 120.0
Heard = Callable[[int], object]


def _nothing(number: int) -> None:
    pass


def joined(peer: str, rank: int, link: Connection, timeout_s: float = LONG_S, heard: Heard = _nothing) -> RowPair:
    """`link` brings entries, and only those: the other end may have its pair sooner, and ask for rows at once.

    heard: called with 0 when we have begun to join, then with the number of each entry before it is passed on.
    """

    def tell(entry: bytes) -> None:
        try:
            link.send_bytes(entry)
        except OSError as error:
            raise LinkClosed(f"the link to {peer} is closed: {error}") from error

    store, number = PairStore(peer, tell, timeout_s), 0
    with ThreadPoolExecutor(1) as pool:
        pair, is_open = pool.submit(join, peer, rank, store, HOST, CPU, timeout_s), True
        heard(number)
        while is_open and not pair.done():
            try:
                if link.poll(0.001):
                    entry = link.recv_bytes()
                    number += 1
                    heard(number)
                    store.hear(entry)
            except (EOFError, OSError):
                store.close("its link is closed")
                is_open = False
        return pair.result()


def serve(conn: Connection, link: Connection, name: str, rank: int) -> None:
    """A worker: joins a pair when it is told to, then sends back twice what comes."""
    torch.set_num_threads(1)
    conn.send("here")
    conn.recv()
    pair = joined("attention-0", rank, link)
    while num_rows := conn.recv():
        rows = torch.empty(num_rows, 16, dtype=torch.bfloat16)
        pair.receive(rows).wait(LONG_S)
        pair.send(rows * 2).wait(LONG_S)
    conn.send(name)


class Process:
    """One that is not joined yet."""

    def __init__(self, name: str, rank: int = EXPERT) -> None:
        context = multiprocessing.get_context("spawn")
        self.conn, orders = context.Pipe()
        self._link, link = context.Pipe()
        self.process = context.Process(target=serve, args=(orders, link, name, rank), daemon=True)
        self.process.start()
        orders.close()
        link.close()
        self.name, self._rank = name, rank
        self.conn.recv()

    def join(self, timeout_s: float = LONG_S, heard: Heard = _nothing) -> RowPair:
        self.conn.send("join")
        return joined(self.name, ATTENTION if self._rank == EXPERT else EXPERT, self._link, timeout_s, heard)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join(LONG_S)


class Peer(Process):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.pair = self.join()

    def ask(self, num_rows: int, timeout_s: float = LONG_S) -> torch.Tensor:
        self.conn.send(num_rows)
        rows = torch.arange(num_rows * 16).view(num_rows, 16).to(torch.bfloat16)
        sent, answer = self.pair.send(rows), torch.zeros_like(rows)
        self.pair.receive(answer).wait(timeout_s)
        sent.wait(timeout_s)
        assert torch.equal(answer, rows * 2)
        return answer

    def end(self) -> None:
        self.pair.close()
        super().end()
