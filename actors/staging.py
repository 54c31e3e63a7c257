"""Rows of a GPU worker on their way through host memory, so that whatever link there is carries them.

Kernels and copies follow one another on one stream; the host waits only for what it is about to send.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from ..model.from_device import Fetched, fetch
from ..model.ops import Operand, Ops
from ..model.to_device import on_device
from .dispatch import RemoteExperts
from .expert_host import ExpertHost
from .hops import RemoteHandle


@dataclass(slots=True)
class StagedHandle:
    layer: int
    first_row: int
    x: Tensor
    fetched: Fetched  # topk_idx [M, k], and x [M, hidden] unless its rows stay on the device
    remote: RemoteHandle | None = None  # once they have been sent


class StagedExperts:
    """RemoteExperts for rows on a device. The host waits for them late: shared experts compute meanwhile."""

    has_waits = True
    may_redo = False
    is_whole = True
    can_be_noted = False

    def __init__(self, remote: RemoteExperts, ops: Ops) -> None:
        self.remote = remote
        self._ops = ops
        self._unsent: deque[StagedHandle] = deque()

    @property
    def phase(self) -> int:
        return self.remote.phase

    @phase.setter
    def phase(self, phase: int) -> None:
        self.remote.phase = phase

    @property
    def wait_s(self) -> float:
        return self.remote.wait_s

    def dispatch(self, layer: int, x: Operand, topk_idx: Tensor, first_row: int = 0) -> StagedHandle:
        """x: [M, hidden] and topk_idx: [M, k] on the device. Sends what earlier calls have left."""
        self._send()
        rows = self._ops.tensor(x)
        fetched = fetch(topk_idx) if self.remote.is_paired else fetch(topk_idx, rows)
        handle = StagedHandle(layer, first_row, rows, fetched)
        self._unsent.append(handle)
        return handle

    def collect(self, handle: StagedHandle) -> Tensor:
        """[M, k, hidden] on the device."""
        self._send()
        assert handle.remote is not None, "collected twice, or after its step broke off"
        return on_device(self.remote.collect(handle.remote), self._ops.device)

    def take_failed(self) -> dict[int, str]:
        self._unsent.clear()  # of a step that broke off
        return self.remote.take_failed()

    def is_settled(self) -> bool:
        return True

    def end_step(self) -> None:
        self.remote.end_step()

    def _send(self) -> None:
        while self._unsent:
            handle = self._unsent.popleft()
            topk_idx, *copied = handle.fetched.wait()
            x = copied[0] if copied else handle.x
            handle.remote = self.remote.dispatch(handle.layer, x, topk_idx, handle.first_row)


class StagedHost(ExpertHost):
    """ExpertHost whose weights lie on a device; slices and rows are the host's, where the links read and write."""

    def compute(self, layer: int, x: Tensor, rows: Tensor, places: Tensor, out: Tensor) -> None:
        held = self._weights[layer]
        x, rows, places = (on_device(tensor, held.ops.device) for tensor in (x, rows, places))
        (computed,) = fetch(held.ops.grouped_mlp(x, rows, places, held.w13, held.w2)).wait()
        out.copy_(computed)
