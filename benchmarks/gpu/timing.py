"""Times kernels by CUDA events around a replayed graph, over operands that take turns; by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REPEATS = 7
LEAST_MS = 2.0  # of one measurement: far above what an event resolves
MOST_COPIES = 32

Runs = Sequence[Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one run: median, least and most of `repeats` measurements."""

    us: float
    least_us: float
    most_us: float
    repeats: int


def timed(runs: Runs, device: torch.device, is_captured: bool = True) -> Timing:
    """`runs` do the same work on operands of their own, so that none finds its operands in the L2 cache.

    `is_captured` False: launched one by one, for what a graph cannot hold; the time then has the host's part in it.
    """
    for run in runs:
        run()  # compiles
    if device.type != "cuda":
        return summed_up([_clocked(runs) for _ in range(2)])
    return summed_up(_replayed(runs) if is_captured else _launched(runs))


def copies(num_bytes: float, device: torch.device) -> int:
    """How many sets of operands of `num_bytes` exceed three times the L2 cache; small ones may fit all the same."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(int(3 * cache // max(num_bytes, 1)) + 1, 1), MOST_COPIES)


def summed_up(times_us: Sequence[float]) -> Timing:
    return Timing(statistics.median(times_us), min(times_us), max(times_us), len(times_us))


def _clocked(runs: Runs) -> float:
    begun = time.perf_counter()
    for run in runs:
        run()
    return (time.perf_counter() - begun) * 1e6 / len(runs)


def _replayed(runs: Runs) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return _between_events(graph.replay, len(runs))


def _launched(runs: Runs) -> list[float]:
    def all_of_them() -> None:
        for run in runs:
            run()

    return _between_events(all_of_them, len(runs))


def _between_events(work: Callable[[], None], num_runs: int) -> list[float]:
    work()
    loops = max(int(LEAST_MS / max(_elapsed_ms(work, 1), 1e-3)), 1)
    return [_elapsed_ms(work, loops) * 1e3 / (loops * num_runs) for _ in range(REPEATS)]


def _elapsed_ms(work: Callable[[], None], loops: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(loops):
        work()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed
