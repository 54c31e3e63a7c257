"""What is known of dispatches on their way to expert workers and back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .links import Link
from .pairs import Ints, scatter
from .row_buffers import RowBuffer, RowBuffers


@dataclass(slots=True)
class Part:
    """What one expert worker owes: the flat slots (row * k + slot) of one layer's dispatch."""

    handle: RemoteHandle
    owner: int
    link: Link
    slots: Ints
    expires: float
    sent: float = 0.0


@dataclass(slots=True)
class RemoteHandle:
    """Returned by dispatch, consumed by collect: holds the inputs until every row is back."""

    layer: int
    x: Tensor
    experts: Ints
    top_k: int
    first_row: int
    whole: Tensor | None = None  # [M, k, hidden], the answer of one worker that had everything
    hold: object = None  # keeps its memory where it is
    buffer: RowBuffer | None = None  # else where the rows of several come together
    pending: dict[int, Part] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        return self.x.shape[1] * self.x.itemsize

    def host_x(self) -> Tensor:
        """x where links read it."""
        return self.x

    def take_in(self, slots: Ints, payload: memoryview, buffers: RowBuffers) -> None:
        """payload: one row for each slot."""
        scatter(payload, slots, self.gathered(buffers).rows)

    def gathered(self, buffers: RowBuffers) -> RowBuffer:
        """Where the rows of several workers come together."""
        if self.buffer is None:
            self.buffer = buffers.take(len(self.experts), self.x.shape[1], self.x.dtype)
        return self.buffer


@dataclass(slots=True)
class Counters:
    """Sums. A hop is one worker's share of a layer; `timed` are those whose rows were waited for, not fetched late."""

    hops: int = 0
    rows: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    resent: int = 0
    timed: int = 0
    serialise_s: float = 0.0
    wire_s: float = 0.0  # both ways, of the timed hops
    queue_s: float = 0.0
    compute_s: float = 0.0
    wait_s: float = 0.0
