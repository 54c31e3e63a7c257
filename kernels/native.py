"""Products with packed matrices by the native module: what `reference` defines, several times as fast for a few rows.

Invariant: an output is one chain of fp32 sums over the inputs in their order, rounded once, whatever else is computed
with it. So a row has the same bits among any others; they are not the bits of `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

IS_BUILT = find_spec("._native", __package__) is not None  # not so where no compiler was at hand
if IS_BUILT or TYPE_CHECKING:
    from . import _native

LANES = 16
DTYPES = (torch.float32, torch.bfloat16)


def available(dtype: torch.dtype) -> bool:
    """Whether the module is built and this CPU has the instructions that it needs for the dtype."""
    if not IS_BUILT or dtype not in DTYPES or not _native.has_avx512():
        return False
    return dtype == torch.float32 or _native.has_avx512_bf16()


def set_threads(count: int) -> None:
    """How many threads compute, the calling one included; only one thread of a process may call kernels."""
    _native.set_threads(count)


@dataclass(frozen=True, slots=True)
class PackedStack:
    """`count` matrices [outputs, inputs] of one shape, laid out for the kernels in `data` [count, size]."""

    data: Tensor
    outputs: int
    inputs: int
    is_gate_up: bool  # the first layer of an MLP: gate and up outputs interleaved, for the MLP kernels only
    address: int = field(init=False)
    is_bf16: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.data.data_ptr())
        object.__setattr__(self, "is_bf16", self.data.dtype == torch.bfloat16)

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.data.shape[0], self.outputs, self.inputs

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [outputs, inputs], laid out for the kernels: the only one of its stack."""

    stack: PackedStack

    @property
    def shape(self) -> tuple[int, int]:
        return self.stack.outputs, self.stack.inputs

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def nbytes(self) -> int:
        return self.stack.nbytes


def pack(weight: Tensor, is_gate_up: bool = False) -> PackedMatrix:
    """weight: [N, K], fp32 or bf16 -> its packed copy.

    `is_gate_up`: the matrix is the w13 [2I, H] of an MLP, gate rows first; `swiglu_mlp` takes no other, `linear` none.
    """
    return PackedMatrix(pack_stack([weight], is_gate_up))


def pack_stack(weights: Tensor | Sequence[Tensor], is_gate_up: bool = False) -> PackedStack:
    """weights: [E, N, K], or E matrices [N, K], fp32 or bf16 -> their packed copies; `is_gate_up` as for `pack`."""
    first = weights[0]
    (outputs, inputs), dtype = first.shape, first.dtype
    if dtype not in DTYPES:
        raise ValueError(f"a {dtype} matrix cannot be packed: convert it to one of {DTYPES}")
    if inputs == 0 or outputs == 0 or (is_gate_up and outputs % 2):
        raise ValueError(f"a matrix [{outputs}, {inputs}] cannot be packed{' as gate and up' * is_gate_up}")
    data = torch.empty(len(weights), _packed_size(outputs, inputs, dtype, is_gate_up), dtype=dtype)
    for weight, out in zip(weights, data, strict=True):
        assert weight.shape == first.shape and weight.dtype == dtype, "matrices of a stack are of one shape and dtype"
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        is_bf16 = dtype == torch.bfloat16
        _native.pack(is_bf16, weight.data_ptr(), weight.stride(0), outputs, inputs, is_gate_up, out.data_ptr())
    return PackedStack(data, outputs, inputs, is_gate_up)


def _packed_size(outputs: int, inputs: int, dtype: torch.dtype, is_gate_up: bool) -> int:
    """Elements: outputs in vectors, of gate and up together in pairs of pairs; inputs in words of 32 bits."""
    padded = -(-outputs // 2 // 32) * 64 if is_gate_up else -(-outputs // LANES) * LANES
    return padded * (inputs + inputs % 2 if dtype == torch.bfloat16 else inputs)


def linear(
    x: Tensor, weight: PackedMatrix, bias: Tensor | None = None, out: Tensor | None = None, fp32_out: bool = False
) -> Tensor:
    """x: [M, K], weight: [N, K], bias: [N] -> [M, N] in x's dtype, or unrounded in fp32."""
    w = weight.stack
    rows, inputs = x.shape
    if out is None:
        out = torch.empty(rows, w.outputs, dtype=torch.float32 if fp32_out else x.dtype)
    assert inputs == w.inputs and x.dtype == w.data.dtype and not w.is_gate_up, f"{x.shape} by {weight.shape}"
    assert out.shape == (rows, w.outputs) and x.stride(1) == out.stride(1) == 1
    assert out.dtype == (torch.float32 if fp32_out else x.dtype)
    _native.linear(
        w.is_bf16, fp32_out, x.data_ptr(), x.stride(0), 0, rows, 1,
        w.address, w.outputs, inputs, 0 if bias is None else bias.data_ptr(), out.data_ptr(), out.stride(0), 0,
    )  # fmt: skip
    return out


def head_linear(x: Tensor, weight: PackedStack, out: Tensor | None = None) -> Tensor:
    """x: [M, heads, K], weight: one [N, K] per head -> [M, heads, N]; all but the last dimension may be strided."""
    rows, heads, inputs = x.shape
    if out is None:
        out = torch.empty(rows, heads, weight.outputs, dtype=x.dtype)
    assert (heads, inputs) == (len(weight), weight.inputs) and not weight.is_gate_up, f"{x.shape} by {weight.shape}"
    assert x.dtype == out.dtype == weight.data.dtype and x.stride(2) == out.stride(2) == 1
    assert out.shape == (rows, heads, weight.outputs)
    _native.linear(
        weight.is_bf16, False, x.data_ptr(), x.stride(0), x.stride(1), rows, heads,
        weight.address, weight.outputs, inputs, 0, out.data_ptr(), out.stride(0), out.stride(1),
    )  # fmt: skip
    return out


def swiglu_mlp(x: Tensor, w13: PackedMatrix, w2: PackedMatrix, out: Tensor | None = None) -> Tensor:
    """x: [M, H], w13: [2I, H] packed as gate and up, w2: [H, I] -> [M, H]."""
    return _mlp(x, None, None, w13.stack, w2.stack, out)


def grouped_mlp(
    x: Tensor,
    row_of_pair: Tensor,
    expert_of_pair: Tensor,
    w13: PackedStack,
    w2: PackedStack,
    out: Tensor | None = None,
) -> Tensor:
    """One MLP row per (token row, expert) pair, in the order given.

    x: [n, H], row_of_pair, expert_of_pair: int64 [P] (expert = index into the stacks),
    w13: E matrices [2I, H] packed as gate and up, w2: E matrices [H, I] -> [P, H].
    """
    return _mlp(x, row_of_pair, expert_of_pair, w13, w2, out)


def _mlp(
    x: Tensor, row_of: Tensor | None, expert_of: Tensor | None, w13: PackedStack, w2: PackedStack, out: Tensor | None
) -> Tensor:
    pairs = x.shape[0] if row_of is None else row_of.shape[0]
    if out is None:
        out = torch.empty(pairs, w2.outputs, dtype=x.dtype)
    assert w13.is_gate_up and not w2.is_gate_up and w13.outputs == 2 * w2.inputs, f"{w13.shape} then {w2.shape}"
    assert x.shape[1] == w13.inputs and x.dtype == w13.data.dtype == w2.data.dtype == out.dtype
    assert out.shape == (pairs, w2.outputs) and x.stride(1) == out.stride(1) == 1
    if row_of is not None and expert_of is not None:
        assert row_of.dtype == expert_of.dtype == torch.int64 and expert_of.shape == row_of.shape
        assert row_of.is_contiguous() and expert_of.is_contiguous()
    _native.mlp(
        w13.is_bf16, x.data_ptr(), x.stride(0), x.shape[0],
        0 if row_of is None else row_of.data_ptr(), 0 if expert_of is None else expert_of.data_ptr(), pairs, len(w13),
        w13.address, w2.address, w13.inputs, w2.inputs, w2.outputs, out.data_ptr(), out.stride(0),
    )  # fmt: skip
    return out
