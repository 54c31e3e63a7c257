"""What stands between the first projections and attention: latent norm, rope, and the write into the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def latent_kernel(
    latent_ptr, weight_ptr, cos_ptr, sin_ptr, slot_ptr, cache_ptr, latent_stride, eps, rank,
    ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: norm of the kv latent, rope of the shared key, both into the row's slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    column = tl.arange(0, BLOCK)
    source = latent_ptr + row * latent_stride
    to = cache_ptr + slot * (rank + ROPE)
    x = tl.load(source + column, mask=column < rank, other=0.0)
    wide = x.to(tl.float32)
    normed = (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / rank + eps))).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < rank, other=0.0).to(tl.float32)
    tl.store(to + column, (normed * weight).to(x.dtype), mask=column < rank)
    half = tl.arange(0, ROPE // 2)
    first_at = 2 * half if INTERLEAVED else half
    second_at = first_at + (1 if INTERLEAVED else ROPE // 2)
    first = tl.load(source + rank + first_at).to(tl.float32)
    second = tl.load(source + rank + second_at).to(tl.float32)
    first, second = rotate(first, second, tl.load(cos_ptr + row * ROPE + half), tl.load(sin_ptr + row * ROPE + half))
    tl.store(to + rank + half, first.to(x.dtype))
    tl.store(to + rank + ROPE // 2 + half, second.to(x.dtype))


@triton.jit
def rope_kernel(
    q_ptr, cos_ptr, sin_ptr, out_ptr, q_row, q_head, out_row, out_head, H,
    ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, ROPE // 2)
    first_at = 2 * half if INTERLEAVED else half
    second_at = first_at + (1 if INTERLEAVED else ROPE // 2)
    inside = (head < H)[:, None]
    source = q_ptr + row * q_row + head[:, None] * q_head
    first = tl.load(source + first_at[None, :], mask=inside, other=0.0)
    second = tl.load(source + second_at[None, :], mask=inside, other=0.0)
    cos = tl.load(cos_ptr + row * ROPE + half)[None, :]
    sin = tl.load(sin_ptr + row * ROPE + half)[None, :]
    dtype = first.dtype
    first, second = rotate(first.to(tl.float32), second.to(tl.float32), cos, sin)
    to = out_ptr + row * out_row + head[:, None] * out_head
    tl.debug_barrier()  # `out` may be `q`: every pair is read before any half is written
    tl.store(to + half[None, :], first.to(dtype), mask=inside)
    tl.store(to + (ROPE // 2 + half)[None, :], second.to(dtype), mask=inside)


def write_latents(
    latent: Tensor, norm_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, cache_layer: Tensor,
    interleaved: bool,
) -> None:  # fmt: skip
    """latent: [M, rank + rope] (rows may be strided), cos, sin: fp32 [M, rope] with equal halves, slots: int64 [M]
    (block * block_size + offset); writes rows of cache_layer [blocks, block_size, rank + rope]."""
    rope = cos.shape[1]
    rank = latent.shape[1] - rope
    if latent.shape[0]:
        latent_kernel[(latent.shape[0],)](
            latent, norm_weight, cos, sin, slots, cache_layer, latent.stride(0), eps, rank,
            ROPE=rope, INTERLEAVED=interleaved, BLOCK=triton.next_power_of_2(rank), num_warps=4,
        )  # fmt: skip


def rope(q: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor) -> Tensor:
    """q: [M, heads, rope] -> out, of the same shape and possibly the same memory; both may be strided."""
    rows, heads, width = q.shape
    if rows:
        tile = min(triton.next_power_of_2(heads), 32)
        rope_kernel[(rows, triton.cdiv(heads, tile))](
            q, cos, sin, out, q.stride(0), q.stride(1), out.stride(0), out.stride(1), heads,
            ROPE=width, INTERLEAVED=interleaved, HEADS=tile, num_warps=4,
        )  # fmt: skip
    return out
