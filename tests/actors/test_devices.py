"""A worker's device: the CPU without GPUs, a clear refusal where none is visible, and the memory of a share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from braid.actors.devices import CPU, WorkerDevice, device_for, room_in_share, too_many
from braid.actors.loading import resolve_dtype
from braid.model.config import ModelConfig

BUNDLED = Path(__file__).parents[2] / "model" / "bundled"
GIB = 1 << 30


def test_without_gpus_the_cpu_computes() -> None:
    assert device_for(0.0) is CPU
    assert not CPU.is_gpu
    assert CPU.report() == {"device": "CPU"}
    assert CPU.available_memory() > 0


def test_a_worker_that_sees_no_gpu_says_what_to_do() -> None:
    command = [sys.executable, "-P", "-c", "from braid.actors.devices import device_for; device_for(0.5)"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # as Ray sets it for a process that gets none
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert "ValueError: gpus is 0.5 and no CUDA device is visible to torch" in done.stderr
    assert "or set gpus to 0" in done.stderr


def test_a_worker_that_sees_more_than_its_own_gpu_takes_none() -> None:
    assert too_many(1) is None
    told = too_many(8)
    assert told is not None
    assert "8 GPUs are visible to a worker that was given one or a share of it" in told
    assert "without RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES" in told


@pytest.mark.parametrize(("env", "told"), [({}, "Failed to find C compiler"), ({"CC": "/bin/false"}, "'/bin/false'")])
def test_a_machine_on_which_triton_cannot_build_is_told_of_with_the_remedy(
    env: dict[str, str], told: str, tmp_path: Path
) -> None:
    script = """
from triton.backends.nvidia.driver import CudaDriver
CudaDriver.is_active = staticmethod(lambda: True)
from braid.actors.devices import why_no_launches
print(why_no_launches())
"""
    nothing = {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    kept = {name: value for name, value in os.environ.items() if name != "CC"}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, env=kept | nothing | env, capture_output=True, text=True, timeout=120)
    assert "Triton cannot build what launches GPU kernels; it wants a C compiler (gcc or clang" in done.stdout, done
    assert "and the headers of Python 3." in done.stdout
    assert told in done.stdout.partition("It said: ")[2]


def test_a_share_of_a_gpu_that_others_use_too() -> None:
    assert room_in_share(free=70 * GIB, total=80 * GIB, used=5 * GIB, share=0.5) == 35 * GIB
    assert room_in_share(free=10 * GIB, total=80 * GIB, used=5 * GIB, share=0.5) == 10 * GIB, "others took theirs"
    assert room_in_share(free=70 * GIB, total=80 * GIB, used=50 * GIB, share=0.5) == 0
    assert WorkerDevice(torch.device("cuda", 0), "NVIDIA H100", 0.5).is_gpu


def test_gpus_compute_in_bfloat16_whatever_the_checkpoint_is_in() -> None:
    config = ModelConfig.from_path(BUNDLED)
    assert resolve_dtype("auto", config, on_gpu=True) == torch.bfloat16
    assert resolve_dtype("bfloat16", config, on_gpu=True) == torch.bfloat16
    with pytest.raises(ValueError, match="float32, and the GPU kernels compute in bfloat16"):
        resolve_dtype("float32", config, on_gpu=True)
