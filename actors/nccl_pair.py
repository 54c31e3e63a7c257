"""Rows between two workers over a communicator of their own: of two ranks, made, lost and made again without others.

A link keeps its control messages; the rows of a message go through its pair, and are asked for there in the order in
which the messages come. A pair has a communicator for each direction: NCCL runs the operations of one in order, so two
sends that meet in one would wait for each other. The two ends find each other by what they tell over the link
(`pair_store.py`), which has proved who is there. Whatever fails or comes too late ends the pair, and no other one.

On CUDA devices it is NCCL's, else gloo's. The NCCL half has not met two GPUs. NCCL's bootstrap lets in who knows the
random number of 64 bits in the communicator's id, which goes over the link; its transports' sockets, and all of gloo's,
which serve tests, ask for nothing that is secret. They belong on a network that only the cluster's hosts are on.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .links import DialFailed, LinkClosed, LinkError
from .pair_store import PairStore

log = logging.getLogger(__name__)

c10d: Any = torch.distributed  # which does not say that its groups are its own
EXPERT, ATTENTION = 0, 1  # ranks
POLL_S = 50e-6
# Read by the constructor of torch's groups and by NCCL. Otherwise torch's watchdog, or a monitor of that one, ends the
# whole process with a pair that breaks or hangs, and NCCL opens a port to whoever asks how it is.
SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "NCCL_RAS_ENABLE": "0",
}


class PairTimeout(LinkError):
    """The peer is linked and silent. What was on its way is lost with the pair: make another, or ask somebody else."""


def join(peer: str, rank: int, store: PairStore, host: str, device: torch.device, timeout_s: float) -> RowPair:
    """One end, when the other one is there too. `host`: an address of this machine, or its name.

    Raises DialFailed when the other has not told what it must within `timeout_s`, or the store is closed.
    """
    with _dialing(peer):
        return RowPair(peer, rank, store, host, device, timeout_s)


class RowPair:
    """One end. Used by one thread, but for `close`."""

    def __init__(
        self, peer: str, rank: int, store: PairStore, host: str, device: torch.device, timeout_s: float
    ) -> None:
        self.peer = peer
        self.closed: str | None = None
        self._rank = rank
        self._device = device
        self._store = store  # torch's groups do not keep what of it is Python's
        self._groups = [
            _communicator(c10d.PrefixStore(f"from {sender}", store), rank, host, device, timeout_s)
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
            groups, self._groups = self._groups, []
            if self._device.type == "cuda":
                _abort(self.peer, groups)

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
                self._work.wait(timedelta(milliseconds=math.ceil(1e3 * timeout_s)))  # as whole ones it is taken
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


def _abort(peer: str, groups: list[Any]) -> None:
    """Several are ended as one, as torch wants it. What is begun must be ended, or NCCL would only note down whatever
    this thread asks of it from now on; and nobody who lets a pair go can do anything about one that does not end."""
    groups[0]._group_start()
    for group in groups:
        try:
            group.abort()
        except RuntimeError as error:
            log.warning("a communicator with %s does not end: %s", peer, error)
    groups[0]._group_end()


def _communicator(store: Any, rank: int, host: str, device: torch.device, timeout_s: float) -> Any:
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


def _nccl(store: Any, rank: int, timeout_s: float) -> Any:
    os.environ.update(SETTINGS)
    nccl = c10d.ProcessGroupNCCL  # only builds of torch for CUDA have it
    options = nccl.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.is_high_priority_stream = True  # torch has 32 streams of either priority: not those of everything else
    return nccl(store, rank, 2, options)


@contextmanager
def _dialing(peer: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DialFailed(f"no pair with {peer}: {error}") from error
