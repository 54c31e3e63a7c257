"""The tokens that the rows of one pass give, sampled where their logits are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from .sampler import Ask, SampledToken, Sampler
from .sampling_params import SamplingParams


class RowSampler(Protocol):
    """The tokens that the rows of one pass give."""

    def token(self, row: int, params: SamplingParams, position: int, banned: Sequence[int] = ()) -> SampledToken:
        """With the log-probabilities that the request asks for. Raises NothingToSample."""
        ...

    def choose(self, row: int, params: SamplingParams, position: int, banned: Sequence[int] = ()) -> int:
        """The token alone. Raises NothingToSample."""
        ...

    def is_finite(self, row: int) -> bool:
        """Whether a row that gives nothing has good logits after all: then everything in it is banned."""
        ...


def sampler_for(logits: Tensor, asks: Callable[[], Iterable[Ask]]) -> RowSampler:
    """logits: [R, vocab] fp32. `asks`: all that may be asked of it, which on a GPU is sampled at once."""
    if logits.device.type == "cpu":
        return Sampler(logits)
    from .device_sampler import DeviceSampler  # triton is installed where torch was built for CUDA only

    return DeviceSampler(logits, asks())
