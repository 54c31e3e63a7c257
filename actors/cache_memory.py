"""How rows of the latent cache are read for a link and written from one: in place, or through pinned host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..model.from_device import Aside, Fetched, host_memory, recorded
from ..model.kv_cache import LatentCache
from .wire import bytes_of, rows_from

Runs = list[tuple[int, int]]  # first row and number of rows, of a layer seen as [num_blocks * BLOCK_SIZE, latent_dim]


class Reading(Protocol):
    """Rows that are to be sent, one run after the other; `pieces` waits until they can be read."""

    def is_there(self) -> bool: ...

    def pieces(self) -> list[memoryview]: ...


class CacheMemory(Protocol):
    row_bytes: int

    def read(self, layer: int, runs: Runs) -> Reading: ...

    def write(self, layer: int, runs: Runs, payload: memoryview) -> None:
        """payload: the rows of all runs."""
        ...


def memory_of(cache: LatentCache) -> CacheMemory:
    return HostMemory(cache) if cache.layers[0].device.type == "cpu" else DeviceMemory(cache)


@dataclass(frozen=True, slots=True)
class InPlace:
    views: list[memoryview]

    def is_there(self) -> bool:
        return True

    def pieces(self) -> list[memoryview]:
        return self.views


class HostMemory:
    def __init__(self, cache: LatentCache) -> None:
        self.row_bytes = row_bytes_of(cache)
        self._layers = [bytes_of(rows) for rows in cache.layers]

    def read(self, layer: int, runs: Runs) -> InPlace:
        memory, size = self._layers[layer], self.row_bytes
        return InPlace([memory[row * size : (row + count) * size] for row, count in runs])

    def write(self, layer: int, runs: Runs, payload: memoryview) -> None:
        memory, size, done = self._layers[layer], self.row_bytes, 0
        for row, count in runs:
            # not by torch: it would share a copy among threads, and wait for a core that somebody else computes on
            memory[row * size : (row + count) * size] = payload[done : done + count * size]
            done += count * size


@dataclass(frozen=True, slots=True)
class OnItsWay:
    fetched: Fetched

    def is_there(self) -> bool:
        return self.fetched.is_there()

    def pieces(self) -> list[memoryview]:
        return [bytes_of(rows) for rows in self.fetched.wait()]


class DeviceMemory:
    """Rows are copied after the kernels that write them and before those that read them; only `pieces` waits for one.

    Rows that leave are copied beside the kernels of the layers that follow.
    """

    def __init__(self, cache: LatentCache) -> None:
        self.row_bytes = row_bytes_of(cache)
        self._layers = [rows.flatten(0, 1) for rows in cache.layers]
        self._aside = Aside(cache.layers[0].device)

    def read(self, layer: int, runs: Runs) -> OnItsWay:
        rows = self._layers[layer]
        host = host_memory((sum(count for _, count in runs), rows.shape[1]), rows.dtype, rows.device)
        done = 0
        with self._aside.after(recorded(rows.device)):
            for row, count in runs:
                host[done : done + count].copy_(rows[row : row + count], non_blocking=True)
                done += count
            return OnItsWay(Fetched((host,), recorded(rows.device)))

    def write(self, layer: int, runs: Runs, payload: memoryview) -> None:
        rows = self._layers[layer]
        sent = rows_from(payload, rows.dtype, rows.shape[1])
        host = host_memory(sent.shape, rows.dtype, rows.device).copy_(sent)
        done = 0
        for row, count in runs:
            rows[row : row + count].copy_(host[done : done + count], non_blocking=True)
            done += count


def row_bytes_of(cache: LatentCache) -> int:
    return cache.layers[0].shape[-1] * cache.layers[0].itemsize
