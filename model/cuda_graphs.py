"""Kernel calls captured as CUDA graphs, whose temporary memory is one shared pool."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class CudaGraphs:
    """Only the calling thread's launches are captured; replays follow one another on the thread's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # the default one cannot be captured
        # Torch forbids to use a pool again that no graph is left of, and all the others may be forgotten.
        self._keeper = self.capture(lambda: torch.zeros(1, device=device))

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """What makes these calls again. Nothing is computed now; all memory that outlives the calls must be there."""
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector waits: what it would free may be of the device, and to free that can spoil a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
