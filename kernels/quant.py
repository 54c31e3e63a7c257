"""Turns 128x128-block fp8 (e4m3) weights into floats and back, a band of rows at a time so that memory stays bounded.

A value is `float32(code) * scale`, rounded once to float32 and once more to the output's dtype: what DeepSeek's own
cast does. Blocks at the right and bottom edge may be smaller than the block size; they still have a scale of their own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK = (128, 128)
E4M3_MAX = 448.0
# 128 rows of this many columns are worked on at a time: they fit a core's cache, and the heap keeps no large holes.
TILE_COLUMNS = 2048

ScaleFormat = Literal["float32", "ue8m0"]


class BlockFp8(NamedTuple):
    """A weight as an fp8 checkpoint holds it, or several: codes e4m3 [.., N, K], scales fp32, one for each block."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, *shape: int, device: torch.device) -> BlockFp8:
        """shape: [.., N, K]."""
        scales = (*shape[:-2], *scale_shape(shape[-2:]))
        return cls(
            torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(scales, dtype=torch.float32, device=device),
        )

    def rows(self, start: int, stop: int) -> BlockFp8:
        """Of one matrix, from a multiple of 128 on."""
        return BlockFp8(self.codes[start:stop], self.scales[start // BLOCK[0] : -(-stop // BLOCK[0])])

    def to_float(self, dtype: torch.dtype) -> Tensor:
        """Of one matrix: [N, K]."""
        return dequantise(self.codes, self.scales, torch.empty_like(self.codes, dtype=dtype))


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales that belong to a weight of this shape."""
    if len(shape) != 2:
        raise ValueError(f"block fp8 needs a matrix, got a tensor of shape {list(shape)}: leave it unquantised")
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantise(weight: Tensor, scale: Tensor, out: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """weight: e4m3 [N, K]; scale: [ceil(N/128), ceil(K/128)]; out: any float dtype [N, K], written and returned."""
    _check_pair(weight, scale, block)
    if out.shape != weight.shape:
        raise ValueError(f"out has shape {list(out.shape)}, the weight {list(weight.shape)}: give them the same shape")
    wide = scale.to(torch.float32)
    for index in range(scale.shape[0]):
        rows = slice(index * block[0], (index + 1) * block[0])
        row_scale = _spread(wide[index], block[1], weight.shape[1])
        for start in range(0, weight.shape[1], TILE_COLUMNS):
            tile = rows, slice(start, start + TILE_COLUMNS)
            out[tile].copy_(e4m3_to_float32(weight[tile]).mul_(row_scale[tile[1]]))
    return out


def quantise(
    weight: Tensor, scale_format: ScaleFormat = "float32", block: tuple[int, int] = BLOCK
) -> tuple[Tensor, Tensor]:
    """weight: float [N, K] -> (e4m3 [N, K], scale float32, one a block). A block's largest value becomes 448."""
    scale = torch.empty(scale_shape(tuple(weight.shape), block), dtype=torch.float32, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for index in range(scale.shape[0]):
        band = slice(index * block[0], (index + 1) * block[0])
        values = weight[band].to(torch.float32)
        scale[index] = _block_scales(values, scale_format, block[1])
        row = _spread(scale[index], block[1], weight.shape[1])
        # Without the clamp a value a hair above 448 * scale would depend on whether this build's cast saturates.
        codes[band].copy_((values / row).clamp_(-E4M3_MAX, E4M3_MAX))
    return codes, scale


def e4m3_to_float32(codes: Tensor) -> Tensor:
    """Exact, and much faster than the CPU's cast: the bits land in a bfloat16 whose exponent is 120 too small."""
    signed = codes.view(torch.int8).to(torch.int16)
    magnitude = signed & 0x7F
    bits = (signed & -0x8000) | (magnitude << 4)
    values = bits.view(torch.bfloat16).to(torch.float32).mul_(2.0**120)
    # The one code that is not a number came out as 480. On a CPU looking for it is quicker than writing all again.
    if codes.device.type != "cpu" or (magnitude.numel() and int(magnitude.max()) == 0x7F):
        values.masked_fill_(magnitude == 0x7F, float("nan"))
    return values


def _block_scales(values: Tensor, scale_format: ScaleFormat, block_columns: int) -> Tensor:
    largest = values.abs().amax(dim=0)
    padding = -largest.shape[0] % block_columns
    largest = torch.nn.functional.pad(largest, (0, padding)).view(-1, block_columns).amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(
            "the weight holds infinite or not-a-number values, which have no block scale: repair the checkpoint"
        )
    scale = largest / E4M3_MAX
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent with mantissa in [0.5, 1)
        power = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_(-127, 127)
        scale = torch.ldexp(torch.ones_like(scale), power)
    # A block of zeros, or one so small that its scale underflows, is stored as it is.
    return torch.where((largest == 0) | (scale == 0), torch.ones_like(scale), scale)


def _spread(band_scale: Tensor, block_columns: int, num_columns: int) -> Tensor:
    """One scale a block -> one scale a column."""
    return band_scale.repeat_interleave(block_columns)[:num_columns]


def _check_pair(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"the weight is {weight.dtype}, not float8_e4m3fn: only e4m3 weights carry block scales")
    expected = scale_shape(tuple(weight.shape), block)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"a weight of shape {list(weight.shape)} in blocks of {block[0]}x{block[1]} needs scales of shape "
            f"{list(expected)}, got {list(scale.shape)}: weight and scale belong to different tensors"
        )
