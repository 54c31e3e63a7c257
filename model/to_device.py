"""Moves what the host has planned or read to where the model computes, without waiting for it.

Pinned memory comes from torch's pool, which takes it back when the copy that was made from it is done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """The tensor itself where it is there already."""
    if host.device == device:
        return host
    return _pinned(host, device).to(device, non_blocking=True)


def send(host: Tensor, to: Tensor) -> None:
    """Into memory that stays; `host` may be written again at once."""
    to.copy_(_pinned(host, to.device), non_blocking=True)


def fill(out: Tensor, write: Callable[[Tensor], object]) -> None:
    """Has `out` written in host memory, and brought to its device if that is another: in bands, if called for bands."""
    if out.device.type == "cpu":
        write(out)
    else:
        band = torch.empty(out.shape, dtype=out.dtype, pin_memory=out.is_cuda)
        write(band)
        out.copy_(band, non_blocking=True)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory() if device.type == "cuda" else host
