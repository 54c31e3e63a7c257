"""Answers to dispatches that come alone through a ring: taken out of it, computed and sent in three native steps.

Whatever else stands in the rings is left to `ExpertServer.turn`, which reads it as messages.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .expert_host import ExpertHost
from .links import Link
from .messages import ROWS
from .reactor import Closed, Event, Opened
from .shm_pipe import HAS_NATIVE
from .wire import DTYPE_CODES, bytes_of, rows_from

if HAS_NATIVE:
    from . import _native

if TYPE_CHECKING:
    from ._native import Lane

MAX_ROWS, MAX_PAIRS = 256, 2048  # of one dispatch; those of prompts may be larger, and are slow enough anyway
MAX_VIEWS = 1024

Views = tuple[Tensor, Tensor, Tensor, Tensor]


class Mail(Protocol):
    def spin(self, look: Callable[[int, int], Any]) -> Any: ...


class DirectAnswers:
    def __init__(
        self, host: ExpertHost, hidden: int, num_experts: int, dtype: torch.dtype, counts: Counter[str]
    ) -> None:
        self._host, self._num_experts, self._counts = host, num_experts, counts
        self._row_bytes = hidden * dtype.itemsize
        self._links: list[Link] = []
        self._lanes: tuple[Lane, ...] = ()
        self._x = torch.empty(MAX_ROWS, hidden, dtype=dtype)
        self._rows, self._places = (np.zeros(MAX_PAIRS, dtype=np.int64) for _ in range(2))
        self._views: dict[tuple[int, int, int, int], Views] = {}
        self._look: Callable[[int, int], Any] | None = None

    def note(self, events: list[Event]) -> None:
        """Learns which links there are."""
        if not any(isinstance(event, Opened | Closed) and event.link.lane is not None for event in events):
            return
        for event in events:
            if isinstance(event, Opened) and event.link.lane is not None:
                self._links.append(event.link)
            elif isinstance(event, Closed) and event.link in self._links:
                self._links.remove(event.link)
        self._views.clear()
        self._lanes = lanes = tuple(link.lane for link in self._links if link.lane is not None)
        arguments = (self._row_bytes, DTYPE_CODES[self._x.dtype], self._host.places_of, self._num_experts)
        batch = bytes_of(self._x), self._rows, self._places
        self._look = partial(_native.take_dispatch, lanes, *arguments, *batch) if lanes else None

    def turn(self, mail: Mail) -> bool:
        """Waits awake for a dispatch, for a while, and answers it; False: there is none or it is for the slower way."""
        if self._look is None or (found := mail.spin(self._look)) is None:
            return False
        index, number, layer, num_rows, num_pairs, arrived, start, num_bytes = found
        lane, key = self._lanes[index], (index, start, num_rows, num_pairs)
        x, rows, places, out = self._views.get(key) or self._view(lane, key)
        started = time.monotonic_ns()
        self._host.compute(layer, x, rows, places, out)
        ended = time.monotonic_ns()
        _native.answer(lane, number, num_pairs, arrived, started, ended)
        link = self._links[index]
        link.has_taken(num_bytes)
        link.has_sent(ROWS.size + num_pairs * self._row_bytes)
        counts = self._counts
        counts["tokens"] += num_rows
        counts["rows"] += num_pairs
        counts["hops"] += 1
        counts["batches"] += 1
        return True

    def _view(self, lane: Lane, key: tuple[int, int, int, int]) -> Views:
        """Tensors are dear to make, and the next dispatch will be of the same shape and place."""
        if len(self._views) == MAX_VIEWS:
            self._views.clear()
        _, start, num_rows, num_pairs = key
        memory = lane.outgoing(start, num_pairs * self._row_bytes)
        rows, places = torch.from_numpy(self._rows[:num_pairs]), torch.from_numpy(self._places[:num_pairs])
        out = rows_from(memory, self._x.dtype, self._x.shape[1])
        self._views[key] = made = self._x[:num_rows], rows, places, out
        return made
