"""Rotary position table with YaRN, computed once, on the CPU: a position's cos and sin never depend on others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .config import ModelConfig, RopeScaling


class RopeTable:
    """`table(positions)` -> (cos, sin), each [M, qk_rope_head_dim] fp32 with the two halves equal."""

    def __init__(
        self, config: ModelConfig, max_positions: int | None = None, device: torch.device | None = None
    ) -> None:
        length = config.max_position_embeddings if max_positions is None else max_positions
        # The angle is rounded to fp32, as in training; cos and sin of that angle are exact to the last fp32 bit.
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse_frequencies(config)
        scale = 1.0 if config.rope_scaling is None else config.rope_scaling.table_scale
        self._cos = (angles.double().cos() * scale).float().repeat(1, 2).to(device)
        self._sin = (angles.double().sin() * scale).float().repeat(1, 2).to(device)

    @property
    def num_positions(self) -> int:
        return self._cos.shape[0]

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def fill(
        self, positions: Tensor, cos: Tensor, sin: Tensor, gather: Callable[[Tensor, Tensor, Tensor], object]
    ) -> None:
        """What a call returns, into memory of the caller's. `gather`: that of the family of operations."""
        gather(self._cos, positions, cos)
        gather(self._sin, positions, sin)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[qk_rope_head_dim / 2] fp32; YaRN keeps the fast pairs, slows the slow ones by `factor`, blends between."""
    dim = config.qk_rope_head_dim
    periods = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / periods
    low, high = _blend_range(scaling, dim, config.rope_theta)
    kept = 1.0 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) / (scaling.factor * periods) + kept / periods


def _blend_range(scaling: RopeScaling, dim: int, theta: float) -> tuple[float, float]:
    """Pairs under `low` turn at least `beta_fast` times in the original length, above `high` at most `beta_slow`."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if high == low else high
