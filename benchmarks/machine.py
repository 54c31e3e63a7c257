"""Says which machine and software gave a figure, and whether anybody else was computing meanwhile."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

PACKAGES = ("braid-serve", "torch", "transformers", "ray")


def describe() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return {
        "name": f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}",
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


class OthersCores:
    """`with OthersCores(engine's processes) as others`: afterwards `others.cores` were busy with something else."""

    def __init__(self, processes: Callable[[], Sequence[psutil.Process]]) -> None:
        self._processes = processes
        self.cores = self.seconds = 0.0

    def __enter__(self) -> Self:
        self._began, self._busy_s, self._ours_s = time.monotonic(), _busy_s(), self._used_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        others_s = (_busy_s() - self._busy_s) - (self._used_s() - self._ours_s)
        self.seconds = time.monotonic() - self._began
        self.cores = max(0.0, others_s / max(self.seconds, 1e-3))

    def _used_s(self) -> float:
        used = sum(os.times()[:2])
        for process in self._processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used += times.user + times.system
        return used


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
