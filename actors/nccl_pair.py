"""Rows between two workers over a communicator of their own: of two ranks, made, lost and made again without others.

A link keeps its control messages; the rows of a message go through its pair, and are asked for there in the order in
which the messages come. A pair has a communicator for each direction: NCCL runs the operations of one in order, so two
sends that meet in one would wait for each other. The expert side keeps the store where the two find each other, and
tells of it over the link, which has proved who is there; store and communicators prove nothing, so they belong on a
network that only the cluster's hosts are on. Whatever fails or comes too late ends the pair, and no other one.

On CUDA devices it is NCCL's, else gloo's. The NCCL half has not met two GPUs.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .links import DialFailed, LinkClosed, LinkError

c10d: Any = torch.distributed  # which does not say that its stores and groups are its own
Store = Any
EXPERT, ATTENTION = 0, 1  # ranks
POLL_S = 50e-6


class PairTimeout(LinkError):
    """The peer is linked and silent. What was on its way is lost with the pair: make another, or ask somebody else."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Where a pair can be joined, once. It goes over the link."""

    host: str
    port: int
    key: str


class OfferedPair:
    """The expert side's half until the other one has come. `host`: an address of this machine, or its name."""

    def __init__(self, peer: str, host: str, device: torch.device, timeout_s: float) -> None:
        listener = socket.create_server((host, 0))
        self.offer = Offer(host, listener.getsockname()[1], secrets.token_hex(16))
        self._peer, self._device, self._timeout_s = peer, device, timeout_s
        self._store = _store(self.offer, timeout_s, listener.detach())

    def accept(self) -> RowPair:
        """Waits for the other side to join, `timeout_s` at most. Raises DialFailed."""
        with _dialing(self._peer):
            return RowPair(self._peer, self.offer, self._store, EXPERT, self._device, self._timeout_s)


def join(peer: str, offer: Offer, host: str, device: torch.device, timeout_s: float) -> RowPair:
    """The attention side's half; `host` as for the other. Raises DialFailed after `timeout_s`."""
    with _dialing(peer):
        store = _store(offer, timeout_s)
        return RowPair(peer, Offer(host, offer.port, offer.key), store, ATTENTION, device, timeout_s)


class RowPair:
    """One end. Used by one thread, but for `close`."""

    def __init__(self, peer: str, here: Offer, store: Store, rank: int, device: torch.device, timeout_s: float) -> None:
        self.peer = peer
        self.closed: str | None = None
        self._rank = rank
        self._device = device
        self._store = store  # NCCL looks into it as long as it lives
        self._groups = [
            _communicator(c10d.PrefixStore(f"{here.key}/from {sender}", store), rank, here.host, device, timeout_s)
            for sender in (EXPERT, ATTENTION)
        ]

    def send(self, rows: Tensor) -> Transfer:
        """rows: contiguous, on the pair's device; left alone until the transfer is over. Raises LinkClosed."""
        return self._start("send", self._rank, rows)

    def receive(self, rows: Tensor) -> Transfer:
        """rows: memory for just what the peer sends next. Raises LinkClosed."""
        return self._start("recv", self._other, rows)

    def close(self, reason: str = "closed by its owner") -> None:
        """Frees the communicators; with NCCL whoever waits for one of them, here or on the device, is let go."""
        if self.closed is None:
            self.closed = reason
            groups, self._groups, self._store = self._groups, [], None
            if self._device.type == "cuda":
                groups[0]._group_start()  # torch wants several ended as one
                for group in groups:
                    group.abort()
                groups[0]._group_end()

    @property
    def _other(self) -> int:
        return 1 - self._rank

    def _start(self, operation: str, sender: int, rows: Tensor) -> Transfer:
        assert rows.is_contiguous(), f"rows of strides {rows.stride()} cannot be sent"
        groups = self._groups
        if self.closed is not None:
            raise LinkClosed(f"the pair with {self.peer} is closed: {self.closed}")
        try:
            work = getattr(groups[sender], operation)([rows], self._other, 0)
        except RuntimeError as error:
            raise self.failed(error) from error
        return Transfer(self, work, rows)

    def failed(self, error: RuntimeError) -> LinkClosed:
        self.close(f"{self.peer} is gone: {error}")
        return LinkClosed(f"the pair with {self.peer} is closed: {self.closed}")


class Transfer:
    """Rows on their way."""

    def __init__(self, pair: RowPair, work: Any, rows: Tensor) -> None:
        self._pair = pair
        self._work = work
        self._rows = rows  # theirs until it is over

    def wait(self, timeout_s: float) -> None:
        """Until they are here, or have been taken. Raises LinkClosed and PairTimeout; either is the end of the pair."""
        if self._pair.closed is not None:
            raise LinkClosed(f"the pair with {self._pair.peer} is closed: {self._pair.closed}")
        until = time.monotonic() + timeout_s
        try:
            if not self._rows.is_cuda:
                self._work.wait(timedelta(seconds=timeout_s))
            elif self._is_over(until):
                self._work.wait()  # raises what went wrong
            else:
                raise RuntimeError("not over in time")
        except RuntimeError as error:
            if time.monotonic() < until:
                raise self._pair.failed(error) from error
            told = f"no answer of {self._pair.peer} within {timeout_s:g} s"
            self._pair.close(told)
            raise PairTimeout(told) from error

    def _is_over(self, until: float) -> bool:
        """NCCL's own wait is the stream's and knows no end."""
        while not self._work.is_completed():
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_S)
        return True


def _store(offer: Offer, timeout_s: float, listener: int | None = None) -> Store:
    """With a listening socket's descriptor the store is kept here, else it is that of the offer."""
    return c10d.TCPStore(
        offer.host,
        offer.port,
        is_master=listener is not None,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _communicator(store: Store, rank: int, host: str, device: torch.device, timeout_s: float) -> Any:
    if device.type == "cuda":
        group = _nccl(store, rank, timeout_s)
        group.eager_connect_single_device(device)
        return group
    gloo = c10d.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    return gloo(store, rank, 2, options)


def _nccl(store: Store, rank: int, timeout_s: float) -> Any:
    # Read by the constructor. Otherwise torch's watchdog ends the whole process with a pair that breaks.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    nccl = c10d.ProcessGroupNCCL  # only builds of torch for CUDA have it
    options = nccl.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return nccl(store, rank, 2, options)


@contextmanager
def _dialing(peer: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DialFailed(f"no pair with {peer}: {error}") from error
