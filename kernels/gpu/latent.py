"""What stands between the first projections and attention: latent norm, rope, and the write into the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_pairs(x_ptr, pair, mask, HALF, INTERLEAVED: tl.constexpr):
    """The two numbers of each pair, fp32: neighbours, or one of each half."""
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else first + HALF
    return (
        tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32),
        tl.load(x_ptr + second, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])  # which begins anywhere among a step's numbers
def latent_kernel(
    latent_ptr, weight_ptr, cos_ptr, sin_ptr, slot_ptr, cache_ptr, latent_row, cos_row, sin_row, eps, RANK, HALF,
    INTERLEAVED: tl.constexpr, RANK_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: norm of the kv latent, rope of the shared key, both into the row's slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    if slot >= 0:
        source = latent_ptr + row * latent_row
        to = cache_ptr + slot * (RANK + 2 * HALF)
        dtype: tl.constexpr = cache_ptr.dtype.element_ty
        column = tl.arange(0, RANK_BLOCK)
        wide = tl.load(source + column, mask=column < RANK, other=0.0).to(tl.float32)
        normed = (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / RANK + eps))).to(dtype).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=column < RANK, other=0.0).to(tl.float32)
        tl.store(to + column, (normed * weight).to(dtype), mask=column < RANK)
        pair = tl.arange(0, HALF_BLOCK)
        first, second = load_pairs(source + RANK, pair, pair < HALF, HALF, INTERLEAVED)
        cos = tl.load(cos_ptr + row * cos_row + pair, mask=pair < HALF, other=0.0)
        sin = tl.load(sin_ptr + row * sin_row + pair, mask=pair < HALF, other=0.0)
        tl.store(to + RANK + pair, (first * cos - second * sin).to(dtype), mask=pair < HALF)
        tl.store(to + RANK + HALF + pair, (second * cos + first * sin).to(dtype), mask=pair < HALF)


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_row, x_head, out_row, out_head, cos_row, sin_row, H, HALF,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < H) & (pair < HALF)
    first, second = load_pairs(x_ptr + row * x_row + head * x_head, pair, inside, HALF, INTERLEAVED)
    cos = tl.load(cos_ptr + row * cos_row + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + row * sin_row + pair, mask=pair < HALF, other=0.0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    to = out_ptr + row * out_row + head * out_head
    tl.debug_barrier()  # `out` may be `x`: every pair is read before any half is written
    tl.store(to + pair, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(to + HALF + pair, (second * cos + first * sin).to(dtype), mask=inside)


def write_latents(
    latent: Tensor, norm_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, cache_layer: Tensor,
    interleaved: bool,
) -> None:  # fmt: skip
    """latent: bf16 [M, rank + rope] (rows may be strided), cos, sin: fp32 [M, rope] with equal halves, slots: int64 [M]
    (block * block_size + offset; -1: nowhere); writes rows of cache_layer [blocks, block_size, rank + rope]."""
    rows, rank, half = latent.shape[0], norm_weight.shape[0], cos.shape[1] // 2
    assert cache_layer.is_contiguous(), f"cache rows lie one after another, not {cache_layer.stride()} apart"
    assert rank + 2 * half == cache_layer.shape[2], f"{rank} + {2 * half} numbers for rows of {cache_layer.shape[2]}"
    if rows:
        latent_kernel[(rows,)](
            latent, norm_weight, cos, sin, slots, cache_layer, latent.stride(0), cos.stride(0), sin.stride(0), eps,
            rank, half, INTERLEAVED=interleaved, RANK_BLOCK=triton.next_power_of_2(rank),
            HALF_BLOCK=triton.next_power_of_2(half), num_warps=4,
        )  # fmt: skip


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor | None = None) -> Tensor:
    """x: bf16 [M, heads, d], cos, sin: fp32 [M, d] with equal halves -> [M, heads, d]; `out` may be `x`, both may be
    strided."""
    (rows, heads, width), out = x.shape, torch.empty_like(x) if out is None else out
    if rows:
        tile = min(triton.next_power_of_2(heads), 32)
        rope_kernel[(rows, triton.cdiv(heads, tile))](
            x, cos, sin, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1), cos.stride(0), sin.stride(0),
            heads, width // 2, INTERLEAVED=interleaved, HEADS=tile, HALF_BLOCK=triton.next_power_of_2(width // 2),
            num_warps=4,
        )  # fmt: skip
    return out
