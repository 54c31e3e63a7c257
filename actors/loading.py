"""What both kinds of worker do around loading weights: progress, element type, memory check."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from ..model.config import ModelConfig
from ..model.inventory import bytes_for_role, check_memory
from .settings import Dtype

CGROUP = Path("/sys/fs/cgroup")


class Loading:
    """Written by the loading thread, read by whoever asks `progress`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0
        self.phase = "starting"

    def progress(self, done: int, total: int) -> None:
        with self._lock:
            self._done, self._total, self.phase = done, total, "loading"

    def report(self) -> dict[str, Any]:
        with self._lock:
            return {"phase": self.phase, "done_bytes": self._done, "total_bytes": self._total}


def resolve_dtype(dtype: Dtype, config: ModelConfig, on_gpu: bool = False) -> torch.dtype:
    """`auto` keeps a checkpoint's own precision; FP8 and FP16 become bfloat16, the family's compute type.

    A GPU computes in bfloat16 whatever the checkpoint's. Raises ValueError where it is told float32.
    """
    if on_gpu:
        if dtype == "float32":
            raise ValueError("dtype is float32, and the GPU kernels compute in bfloat16: use auto, or set gpus to 0")
        return torch.bfloat16
    if dtype == "auto":
        return torch.float32 if config.torch_dtype == "float32" and not config.quantization else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def memory_checked(
    config: ModelConfig,
    dtype: torch.dtype,
    role: Literal["attention", "expert"],
    experts: Sequence[int],
    has_mtp: bool,
    available: int,
    keeps_fp8: bool = False,
) -> None:
    """Raises ValueError with the figures when the weights cannot fit: before loading, not after ten minutes."""
    needed = bytes_for_role(config, dtype, role, experts, has_mtp, keeps_fp8)
    check_memory(needed, available)


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that may still be taken: what the machine has free, or what is left of the container's own limit."""
    free = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return free  # no cgroup v2 here
    if limit == "max":
        return free
    cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # a read checkpoint: given back freely
    return min(free, max(int(limit) - used + cached, 0))
