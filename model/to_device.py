"""Moves what the host has planned or read to where the model computes, without waiting for it.

Pinned memory comes from torch's pool, which takes it back when the copy that was made from it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Numbers:
    """int64 numbers as a tensor, for those who need a few at a time: the same memory each time, which `put` writes.

    Between two passes, when the caches are full of weights, `torch.tensor` takes 4 to 11 us for two numbers.
    """

    MOST = 64

    def __init__(self) -> None:
        self._memory = torch.empty(self.MOST, dtype=torch.int64)
        self._cells = self._memory.numpy().data
        self._views = [self._memory[:num] for num in range(self.MOST + 1)]

    def put(self, numbers: Sequence[int]) -> Tensor:
        """Good until the next call."""
        if len(numbers) > self.MOST:
            return torch.tensor(numbers, dtype=torch.int64)
        for place, number in enumerate(numbers):
            self._cells[place] = number
        return self._views[len(numbers)]


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
