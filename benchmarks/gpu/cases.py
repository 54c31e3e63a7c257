"""What a kernel is run on: its operands, the work it must do at least, and what float64 makes of the same operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from braid.kernels.gpu.norm import Quantised
from braid.kernels.gpu.scales import GROUP, num_groups

Rate = Literal["bf16", "fp8"]
Bound = Literal["bandwidth", "rate", "tflop_s"]


@dataclass(frozen=True, slots=True)
class Work:
    """Of one run: bytes that must be read and written, multiply-adds times two, and the rate of the latter."""

    num_bytes: float
    flop: float = 0.0
    rate: Rate = "bf16"


@dataclass(frozen=True, slots=True)
class Target:
    """`least`: a share of the measured copy bandwidth, a share of the measured matrix rate, or TFLOP/s."""

    of: Bound
    least: float


@dataclass(frozen=True, slots=True)
class Run:
    """A case on a device. `expected`: what the first call of `actual` gives, in float64, or as integers.

    `work`: of what was drawn, where chance has a part in it.
    """

    actual: Callable[[], Tensor | Quantised]
    expected: Callable[[], Tensor]
    work: Work | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """`tolerance`: of the norm of the error relative to the norm of what is expected; 0 asks for equality."""

    kernel: str
    shape: str
    rows: int
    work: Work
    tolerance: float
    bind: Callable[[Draw], Run]
    target: Target | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.shape}, {self.rows} rows"


@dataclass(frozen=True, slots=True)
class Draw:
    """Random operands on a device; on "meta" they have shapes only, which is all that compiling asks for."""

    device: torch.device

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """bf16."""
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device).mul_(scale)

    def wide(self, *shape: int) -> Tensor:
        """fp32."""
        return torch.randn(*shape, device=self.device)

    def positive(self, *shape: int) -> Tensor:
        """fp32 in 0.5 .. 1.5."""
        return torch.rand(*shape, device=self.device).add_(0.5)

    def codes(self, *shape: int) -> Tensor:
        """e4m3."""
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device).to(torch.float8_e4m3fn)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(high, shape, dtype=dtype, device=self.device)

    def activations(self, rows: int, columns: int) -> Quantised:
        return Quantised(self.codes(rows, columns), self.positive(num_groups(columns), rows))

    def block_weight(self, outputs: int, inputs: int, *stack: int) -> tuple[Tensor, Tensor]:
        """e4m3 [.., N, K] and its scales, so that products of activations are of order 1."""
        scales = self.positive(*stack, num_groups(outputs), num_groups(inputs)).mul_(inputs**-0.5)
        return self.codes(*stack, outputs, inputs), scales


def widened(x: Quantised) -> Tensor:
    """float64 [M, K]."""
    columns = x.codes.shape[1]
    return x.codes.double() * x.scales.t().double().repeat_interleave(GROUP, 1)[:, :columns]


def widened_weight(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 [N, K]."""
    outputs, inputs = codes.shape
    spread = scales.double().repeat_interleave(GROUP, 0)[:outputs].repeat_interleave(GROUP, 1)[:, :inputs]
    return codes.double() * spread
