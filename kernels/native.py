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
    """How many threads compute, the calling one included; of callers at the same time one has help."""
    _native.set_threads(count)


@dataclass(frozen=True, slots=True)
class PackedStack:
    """`count` matrices [outputs, inputs] of one shape, laid out for the kernels in `data` [count, size]."""

    data: Tensor
    outputs: int
    inputs: int
    is_gate_up: bool  # the first layer of an MLP: gate and up outputs interleaved, for the MLP kernels only
    dtype: torch.dtype = field(init=False)
    address: int = field(init=False)
    is_bf16: bool = field(init=False)

    def __post_init__(self) -> None:  # all that a call needs at hand: reading a tensor's attributes costs more
        object.__setattr__(self, "dtype", self.data.dtype)
        object.__setattr__(self, "address", self.data.data_ptr())
        object.__setattr__(self, "is_bf16", self.dtype == torch.bfloat16)

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.data.shape[0], self.outputs, self.inputs

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
    _native.use_large_pages(data.data_ptr(), data.nbytes)
    for weight, out in zip(weights, data, strict=True):
        assert (weight.shape, weight.dtype) == (first.shape, dtype), "a stack's matrices are of one shape and dtype"
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
    num_rows, inputs = x.shape
    out_dtype = torch.float32 if fp32_out else x.dtype
    if out is None:
        out = x.new_empty(num_rows, w.outputs, dtype=out_dtype)
    (x_stride, x_step), (out_stride, out_step) = x.stride(), out.stride()
    assert (inputs, x.dtype, x_step, w.is_gate_up) == (w.inputs, w.dtype, 1, False), f"{x.shape} by {w.shape}"
    assert (out.shape, out.dtype, out_step) == ((num_rows, w.outputs), out_dtype, 1), f"out: {out.shape}"
    _native.linear(
        w.is_bf16, fp32_out, x.data_ptr(), x_stride, 0, num_rows, 1,
        w.address, w.outputs, inputs, 0 if bias is None else bias.data_ptr(), out.data_ptr(), out_stride, 0,
    )  # fmt: skip
    return out


def head_linear(x: Tensor, weight: PackedStack, out: Tensor | None = None) -> Tensor:
    """x: [M, heads, K], weight: one [N, K] per head -> [M, heads, N]; all but the last dimension may be strided."""
    w = weight
    num_rows, heads, inputs = x.shape
    if out is None:
        out = x.new_empty(num_rows, heads, w.outputs)
    (x_row, x_head, x_step), (out_row, out_head, out_step) = x.stride(), out.stride()
    assert (w.shape, x.dtype, x_step) == ((heads, w.outputs, inputs), w.dtype, 1), f"{x.shape} by {w.shape}"
    assert not w.is_gate_up, "gate and up outputs are interleaved: for the MLP kernels only"
    assert (out.shape, out.dtype, out_step) == ((num_rows, heads, w.outputs), x.dtype, 1), f"out: {out.shape}"
    _native.linear(
        w.is_bf16, False, x.data_ptr(), x_row, x_head, num_rows, heads,
        w.address, w.outputs, inputs, 0, out.data_ptr(), out_row, out_head,
    )  # fmt: skip
    return out


def swiglu_mlp(x: Tensor, w13: PackedMatrix, w2: PackedMatrix, out: Tensor | None = None) -> Tensor:
    """x: [M, H], w13: [2I, H] packed as gate and up, w2: [H, I] -> [M, H]."""
    return _mlp(x, x.shape[0], 0, 0, w13.stack, w2.stack, out)


def grouped_mlp(
    x: Tensor,
    row_of_pair: Tensor,
    expert_of_pair: Tensor,
    w13: PackedStack,
    w2: PackedStack,
    out: Tensor | None = None,
) -> Tensor:
    """One MLP row per (token row, expert) pair, in the order given; IndexError if there is no such row or expert.

    x: [n, H], row_of_pair, expert_of_pair: int64 [P] (expert = index into the stacks),
    w13: E matrices [2I, H] packed as gate and up, w2: E matrices [H, I] -> [P, H].
    """
    (num_pairs,) = row_of_pair.shape
    assert expert_of_pair.shape == row_of_pair.shape, f"{num_pairs} rows, {expert_of_pair.shape} experts"
    for indices in (row_of_pair, expert_of_pair):
        assert (indices.dtype, indices.is_contiguous()) == (torch.int64, True)
    return _mlp(x, num_pairs, row_of_pair.data_ptr(), expert_of_pair.data_ptr(), w13, w2, out)


def _mlp(
    x: Tensor, num_pairs: int, row_of: int, expert_of: int, w13: PackedStack, w2: PackedStack, out: Tensor | None
) -> Tensor:
    """row_of, expert_of: addresses; 0: each row is a pair, the only expert is its own."""
    num_rows, inputs = x.shape
    if out is None:
        out = x.new_empty(num_pairs, w2.outputs)
    (x_stride, x_step), (out_stride, out_step) = x.stride(), out.stride()
    assert (w13.is_gate_up, w2.is_gate_up, w13.outputs) == (True, False, 2 * w2.inputs), f"{w13.shape}, {w2.shape}"
    assert (inputs, x.dtype, x_step, w2.dtype) == (w13.inputs, w13.dtype, 1, x.dtype), f"{x.shape} by {w13.shape}"
    assert (out.shape, out.dtype, out_step) == ((num_pairs, w2.outputs), x.dtype, 1), f"out: {out.shape}"
    _native.mlp(
        w13.is_bf16, x.data_ptr(), x_stride, num_rows, row_of, expert_of, num_pairs, len(w13),
        w13.address, w2.address, inputs, w2.inputs, w2.outputs, out.data_ptr(), out_stride,
    )  # fmt: skip
    return out
