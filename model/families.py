"""Which family of operations a worker computes with: one for each kind of device, and torch's where there is none."""

from __future__ import annotations

import torch

from ..kernels import native
from .config import Quantization
from .native_ops import NativeOps
from .ops import Ops
from .torch_ops import TorchOps

CPU = torch.device("cpu")


def ops_for(dtype: torch.dtype, device: torch.device = CPU, quantization: Quantization | None = None) -> Ops:
    """What a worker computes with on this device; `quantization`: the checkpoint's (config.quantization).

    Raises ValueError where a GPU is to compute in another dtype than bfloat16.
    """
    if device.type == "cpu":
        return NativeOps() if native.available(dtype) else TorchOps(is_packing=True)
    if dtype != torch.bfloat16:
        raise ValueError(f"a GPU computes in bfloat16, not {dtype}: set dtype to auto or bfloat16")
    from .triton_ops import TritonOps  # triton is installed where torch was built for CUDA only

    return TritonOps(device, quantization)
