"""The GPUs of this machine, as far as they can be known without taking one. Imports torch when asked, not before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICES = Path("/dev")


@dataclass(frozen=True, slots=True)
class LocalGpus:
    """Those that workers can use, or the `problem` why there are none; `memory`: bytes of each."""

    names: tuple[str, ...] = ()
    memory: tuple[int, ...] = ()
    problem: str | None = None
    is_there: bool = False  # a GPU, whether it can be used or not

    @property
    def count(self) -> int:
        return 0 if self.problem else len(self.names)

    @property
    def told(self) -> str:
        return f"{self.count} x {self.names[0]}, {min(self.memory) / 2**30:.0f} GiB each"

    @property
    def unused(self) -> str | None:
        """For whoever computes on the CPU beside a GPU."""
        if not self.is_there:
            return None
        if self.problem:
            return f"The workers compute on the CPU: {self.problem}."
        return (
            f"The workers compute on the CPU, beside {self.told}: give every pool GPUs, "
            "such as gpus: 1, or gpus: 0.25 where four workers use one."
        )


def local_gpus(devices: Path = DEVICES) -> LocalGpus:
    import torch

    from ..actors.devices import why_not

    if not torch.cuda.is_available():
        files = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
        problem = without_cuda(files, torch.__version__, torch.version.cuda)
        return LocalGpus(problem=problem, is_there=bool(files))
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    problems = [why_not(each.name, (each.major, each.minor)) for each in found]
    return LocalGpus(
        tuple(each.name for each in found),
        tuple(each.total_memory for each in found),
        next((problem for problem in problems if problem), None),
        is_there=True,
    )


def without_cuda(files: Sequence[str], torch_version: str, cuda_version: str | None) -> str:
    """Why torch finds no GPU. `files`: the GPUs' device files; `cuda_version`: what torch was built for."""
    if not files:
        return "this machine has no NVIDIA GPU"
    there = f"/dev/{files[0]} is there, but torch {torch_version}"
    if cuda_version is None:
        return f"{there} was built without CUDA; install the build with CUDA, which is the one on PyPI"
    return f"{there} for CUDA {cuda_version} cannot use it; see what nvidia-smi says of the driver"
