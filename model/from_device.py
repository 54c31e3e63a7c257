"""Brings what the model has computed to the host, which waits only when it reads.

Pinned memory comes from torch's pool, which gives none of it away before the copies to and from it are done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tensors in host memory, there once `wait` has returned."""

    host: tuple[Tensor, ...]
    event: torch.cuda.Event | None

    def is_there(self) -> bool:
        return self.event is None or self.event.query()  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, in the order in which they were asked for."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


def fetch(*tensors: Tensor) -> Fetched:
    """Starts copying tensors of one device to the host."""
    device = tensors[0].device
    host = tuple(host_memory(tensor.shape, tensor.dtype, device) for tensor in tensors)
    for memory, tensor in zip(host, tensors, strict=True):
        memory.copy_(tensor, non_blocking=True)
    return Fetched(host, recorded(device))


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For copies from and to the device."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


class Aside:
    """A stream of its own, for what shall neither hold up the kernels of the thread's current one nor wait for all."""

    def __init__(self, device: torch.device) -> None:
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def after(self, event: torch.cuda.Event | None) -> Iterator[None]:
        """What is asked of the device inside begins after the event, or, without one, as soon as it can."""
        if self._stream is None:
            yield
            return
        if event is not None:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            yield


def recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event after all that has been asked of a GPU's current stream so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
