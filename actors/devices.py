"""The device of a worker: the GPU that Ray gave its process, else the CPU; what it is called and has room for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

import torch

from .loading import available_memory

HOPPER = 9  # major compute capability that the kernels are compiled for


@dataclass(frozen=True, slots=True)
class WorkerDevice:
    """`share`: of the device's memory, what this worker may take; others on the same GPU take the rest."""

    torch: torch.device
    name: str
    share: float = 1.0

    @property
    def is_gpu(self) -> bool:
        return self.torch.type == "cuda"

    @property
    def is_alone(self) -> bool:
        """A whole GPU: what waits on it for other workers keeps none of them from computing."""
        return self.is_gpu and self.share == 1

    def available_memory(self) -> int:
        """Bytes that this process may still take."""
        if not self.is_gpu:
            return available_memory()
        free, total = torch.cuda.mem_get_info(self.torch)
        reserved = torch.cuda.memory_reserved(self.torch)  # by torch, and not all of it in use
        reusable = reserved - torch.cuda.memory_allocated(self.torch)
        return room_in_share(free + reusable, total, reserved - reusable, self.share)

    def report(self) -> dict[str, Any]:
        """For status and metrics. Any thread: torch is asked, not the driver, as captures would not bear it."""
        if not self.is_gpu:
            return {"device": self.name}
        total = torch.cuda.get_device_properties(self.torch).total_memory
        used = torch.cuda.memory_reserved(self.torch)
        return {"device": self.name, "device_memory_used": used, "device_memory": int(total * self.share)}


CPU = WorkerDevice(torch.device("cpu"), "CPU")


def device_for(gpus: float) -> WorkerDevice:
    """`gpus`: of the worker's pool. Raises ValueError, with the remedy, where there is no GPU that it can use."""
    if gpus == 0:
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(
            f"gpus is {gpus:g} and no CUDA device is visible to torch {torch.__version__} in the worker's process: "
            "place the pool by labels on nodes with an NVIDIA GPU, a driver and a torch with CUDA, or set gpus to 0"
        )
    device = torch.device("cuda", 0)  # Ray shows a process only what it was given
    torch.cuda.set_device(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if problem := too_many(torch.cuda.device_count()) or why_not(name, capability) or why_no_launches():
        raise ValueError(problem)
    return WorkerDevice(device, name, gpus)


def why_not(name: str, capability: tuple[int, int]) -> str | None:
    """Why the GPU kernels cannot run on a device of this compute capability; None if they can."""
    if capability[0] == HOPPER:
        return None
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and the GPU kernels are for {HOPPER}.x "
        "(Hopper: H100, H200): set gpus to 0, or hide it by CUDA_VISIBLE_DEVICES where there are others"
    )


def too_many(num_visible: int) -> str | None:
    """Why it cannot be told which of the visible GPUs is this worker's; None if there is one."""
    if num_visible == 1:
        return None
    return (
        f"{num_visible} GPUs are visible to a worker that was given one or a share of it, and all workers would take "
        "the first: start Ray without RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    )


def why_no_launches() -> str | None:
    """Why kernels cannot be launched, where Triton cannot build what launches them; None if it can, or has before."""
    from triton.runtime import driver  # installed where torch was built for CUDA only

    try:
        _ = driver.active.utils  # made at the first look
    except (AssertionError, OSError, RuntimeError, SubprocessError) as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            "Triton cannot build what launches GPU kernels; it wants a C compiler (gcc or clang, or what CC names) "
            f"and the headers of Python {python} (python3-dev): install them, or set gpus to 0. It said: "
            f"{' '.join(str(error).split())}"
        )
    return None


def room_in_share(free: int, total: int, used: int, share: float) -> int:
    """Bytes that a process may still take of a device that it may have a share of, and uses `used` bytes of."""
    return max(min(free, int(total * share) - used), 0)
