"""How a dense product is cut into programs, and the kernel that adds up its parts.

A matrix of few outputs has too few tiles to keep 132 SMs reading (DeepSeek-V3's 2112 x 7168: 33 of 64 outputs), so its
sum over K is cut as well. Into how many parts, and where, the weight's shape alone decides. They are added in ascending
order: in a second launch where few rows leave SMs idle, in the program's registers where they do not. So a row has the
same bits either way (law 5), and so it has whatever the tiles: these may follow the load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

SMS = 132  # of an H100 and of an H200; a constant of the bits, not of the machine at hand
SMS_BUSY = 2 * SMS  # programs, from which on larger tiles cost nothing
LEAST_STEPS = 8  # a part of fewer steps over K would spend its time on starting
L2_TILES = 16  # token tiles that go through all weight tiles together: as many rows of both as L2 holds
FEW_ROWS = 128  # one token tile: the weights' bytes bind, so small tiles that keep every SM reading


@dataclass(frozen=True, slots=True)
class Tiling:
    """`tokens` x `outputs` a program; the sum over K in `parts` of `part_steps` steps, by `programs` programs (1: all
    parts one after the other, or `parts`: side by side)."""

    tokens: int
    outputs: int
    parts: int
    part_steps: int
    programs: int

    @property
    def is_large(self) -> bool:
        return self.outputs == 128

    def grid(self, num_rows: int, num_outputs: int) -> tuple[int, int, int]:
        """Token tiles fastest: they share the weight tile in L2."""
        return triton.cdiv(num_rows, self.tokens), triton.cdiv(num_outputs, self.outputs), self.programs


def token_tile(num_rows: int) -> int:
    """16 .. 128: below 16 the tensor core would take another instruction, and with it other bits."""
    return min(max(triton.next_power_of_2(num_rows), 16), 128)


def num_parts(num_outputs: int, steps: int) -> int:
    """Parts of the sum over K that fill the SMs when there is one token tile; a constant of the weight's shape."""
    parts = 1
    while triton.cdiv(num_outputs, 64) * parts * 2 <= SMS and steps >= parts * 2 * LEAST_STEPS:
        parts *= 2
    return parts


def tiling_of(num_rows: int, num_outputs: int, steps: int) -> Tiling:
    """`steps` over K, of whatever depth the kernel takes at once."""
    parts, tokens = num_parts(num_outputs, steps), token_tile(num_rows)
    part_steps = triton.cdiv(steps, parts)
    parts = triton.cdiv(steps, part_steps)
    tiles = triton.cdiv(num_rows, tokens) * triton.cdiv(num_outputs, 64)
    if num_rows > FEW_ROWS and tiles * parts > SMS_BUSY:
        return Tiling(tokens, 128, parts, part_steps, programs=1)
    return Tiling(tokens, 64, parts, part_steps, programs=parts)


def narrowed(tiling: Tiling) -> Tiling:
    """For operands that cannot be read 16 bytes at a time: addresses fill the registers, so tiles must be small."""
    return replace(tiling, tokens=16, outputs=64)


def in_sixteens(*numbers: int) -> bool:
    """Whether these sizes, strides and addresses let Triton read 16 bytes at a time."""
    return all(number % 16 == 0 for number in numbers)


@triton.jit
def tile_places(L2_TILES: tl.constexpr):
    """Place of this program's token tile and weight tile: token tiles fastest, L2_TILES of them at a time."""
    group_size = L2_TILES * tl.num_programs(1)
    index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    first = index // group_size * L2_TILES
    tokens = tl.minimum(tl.num_programs(0) - first, L2_TILES)
    within = index % group_size
    return first + within % tokens, within // tokens


@triton.jit(do_not_specialize=["M"])
def merge_kernel(
    parts_ptr, bias_ptr, out_ptr, M, N, out_stride, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    total = sum_of_parts(parts_ptr + row * N + column, M.to(tl.int64) * N, inside, PARTS)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_parts(pointers, part_stride, inside, PARTS: tl.constexpr):
    """fp32: the first part first."""
    total = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(pointers + part * part_stride, mask=inside, other=0.0).to(tl.float32)
    return total


def merge(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """parts: fp32 [parts, M, N], bias: [N] -> out [M, N] in its dtype."""
    num_parts, num_rows, num_outputs = parts.shape
    block = min(triton.next_power_of_2(num_outputs), 1024)
    merge_kernel[(num_rows, triton.cdiv(num_outputs, block))](
        parts, bias, out, num_rows, num_outputs, out.stride(0),
        HAS_BIAS=bias is not None, PARTS=num_parts, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def room_for_parts(tiling: Tiling, num_rows: int, num_outputs: int, device: torch.device) -> Tensor:
    """[programs, M, N]: fp32 where there is something to add up, else bf16."""
    dtype = torch.float32 if tiling.programs > 1 else torch.bfloat16
    return torch.empty(tiling.programs, num_rows, num_outputs, dtype=dtype, device=device)
