"""What a machine's GPUs are good for, in words."""

from __future__ import annotations

from pathlib import Path

import torch

from braid.actors.devices import why_not
from braid.cluster.local_gpus import LocalGpus, local_gpus, without_cuda


def test_this_machine(tmp_path: Path) -> None:
    found = local_gpus(tmp_path)
    assert found.is_there == torch.cuda.is_available()
    assert found.count in (0, torch.cuda.device_count())
    assert (found.unused is None) == (not found.is_there)


def test_a_gpu_that_torch_cannot_use(tmp_path: Path) -> None:
    assert "/dev/nvidia0 is there, but torch 2.13.0+cpu was built without CUDA" in without_cuda(
        ["nvidia0"], "2.13.0+cpu", None
    )
    assert "torch 2.13.0 for CUDA 12.8 cannot use it; see what nvidia-smi says" in without_cuda(
        ["nvidia0"], "2.13.0", "12.8"
    )
    assert without_cuda([], "2.13.0", "12.8") == "this machine has no NVIDIA GPU"
    problem = without_cuda(["nvidia0"], "2.13.0+cpu", None)
    assert LocalGpus(problem=problem, is_there=True).unused == f"The workers compute on the CPU: {problem}."


def test_a_gpu_that_nobody_uses() -> None:
    found = LocalGpus(("NVIDIA H100 80GB HBM3",) * 2, (80 << 30,) * 2, is_there=True)
    assert found.told == "2 x NVIDIA H100 80GB HBM3, 80 GiB each"
    assert found.unused is not None
    assert "beside 2 x NVIDIA H100 80GB HBM3, 80 GiB each: give every pool GPUs" in found.unused


def test_the_kernels_are_for_hopper() -> None:
    assert why_not("NVIDIA H100", (9, 0)) is None
    assert why_not("NVIDIA A100", (8, 0)) == (
        "NVIDIA A100 has compute capability 8.0, and the GPU kernels are for 9.x (Hopper: H100, H200): set gpus to 0, "
        "or hide it by CUDA_VISIBLE_DEVICES where there are others"
    )
