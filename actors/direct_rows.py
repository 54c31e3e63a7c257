"""The attention side of a hop over rings: dispatches written into them and rows taken out of them natively.

Only the plain case is done here. What a ring has no room for, what is no answer, and whoever has no ring is left to
`RemoteExperts`, which sends and reads messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from .framing import HEADER
from .hops import Part, RemoteHandle
from .links import Link
from .pairs import Ints
from .row_buffers import RowBuffers
from .shm_pipe import HAS_NATIVE
from .wire import DTYPE_CODES, rows_from

if HAS_NATIVE:
    from . import _native

if TYPE_CHECKING:
    from ._native import Lane

MAX_VIEWS = 1024

Arrival = tuple[int, Part, int, int, int]  # number, part, nanoseconds queued, computed and held


class Mail(Protocol):
    def spin(self, look: Callable[[int, int], Any]) -> Any: ...


class DirectRows:
    """links: of each owner, None where there is none."""

    def __init__(self, links: Sequence[Link | None], buffers: RowBuffers) -> None:
        self._lanes: tuple[Lane | None, ...] = tuple(None if link is None else link.lane for link in links)
        self._buffers = buffers
        self._views: dict[tuple[int, int, int, int], Tensor] = {}
        self._look: Callable[[int, int], Any] | None = None
        if any(lane is not None for lane in self._lanes):
            self._look = partial(_native.take_rows, self._lanes)

    def send(
        self, handle: RemoteHandle, owner_of: Ints, loads: Ints, number: int, epoch: int, phase: int
    ) -> tuple[Ints, list[tuple[int, int, int, int, float]]]:
        """All slots of the handle to their owners; owner_of, loads: [experts], to which each expert's slots are added.

        Returns the slots grouped by owner, and of each owner that has some: its index (-1: nobody), the first of its
        slots and their number, the payload's bytes (-1 if it is still to be sent) and when it left, by the monotonic
        clock. Those that left are numbered from `number` on.
        """
        order, x = np.empty_like(handle.experts), handle.x
        numbers = number, epoch, handle.layer, phase, DTYPE_CODES[x.dtype]
        args = owner_of, handle.experts, handle.top_k, x.data_ptr(), handle.row_bytes
        return order, _native.dispatch(self._lanes, *args, *numbers, order, loads)

    def take(self, mail: Mail, parts: dict[int, Part]) -> Arrival | None:
        """Waits awake for an answer to one of the parts, for a while, and puts its rows where their handle wants them.

        None: there is none, or what comes first is to be read as a message.
        """
        if self._look is None or (found := mail.spin(self._look)) is None:
            return None
        owner, number, queue_ns, compute_ns, held_ns, num_bytes, start, frame_bytes = found
        part, lane = parts.get(number), self._lanes[owner]
        if part is None or part.owner != owner or num_bytes != len(part.slots) * part.handle.row_bytes:
            return None
        assert lane is not None
        handle = part.handle
        if len(part.slots) == len(handle.experts) and (hold := lane.hold(frame_bytes)) is not None:
            view = self._views.get((owner, start, num_bytes, handle.top_k))
            handle.whole = self._view(part, start, num_bytes) if view is None else view
            handle.hold = hold
        else:
            rows = handle.gathered(self._buffers)
            _native.scatter_rows(lane, start, handle.row_bytes, part.slots, rows.bytes)
            lane.consume(frame_bytes)
        part.link.has_taken(frame_bytes - HEADER.size)
        return number, part, queue_ns, compute_ns, held_ns

    def _view(self, part: Part, start: int, num_bytes: int) -> Tensor:
        """[M, k, hidden]. Tensors are dear to make, and the next answer will be of the same shape and place."""
        if len(self._views) == MAX_VIEWS:
            self._views.clear()
        handle, lane = part.handle, self._lanes[part.owner]
        assert lane is not None
        rows = rows_from(lane.incoming(start, num_bytes), handle.x.dtype, handle.x.shape[1])
        view = rows.view(-1, handle.top_k, rows.shape[1])
        self._views[part.owner, start, num_bytes, handle.top_k] = view
        return view
