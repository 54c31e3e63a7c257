"""MLA over the paged latent cache by the native module; what it computes is defined in attention.py.

Invariant: a row's bits depend on its own position and its own sequence's cache only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .native import IS_BUILT, PackedMatrix

if IS_BUILT or TYPE_CHECKING:
    from . import _native

BLOCK_SIZE = 64  # tokens of a cache block; the kernels' tiles of keys are these


def mla_decode(
    q: Tensor,
    cache_layer: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    out: Tensor | None = None,
) -> Tensor:
    """Attended latents of absorbed queries: each row sees the positions 0 .. its own of its sequence.

    q: [R, heads, latent_dim], cache_layer: [blocks, 64, latent_dim] contiguous, positions: int64 [R],
    block_tables: int32 or int64 [R, width] -> [R, heads, kv_lora_rank]; fp32 or bf16, all of one dtype.
    Rows of one sequence that follow one another share the reading of its cache.
    """
    num_rows, heads, latent_dim = q.shape
    if out is None:
        out = q.new_empty(num_rows, heads, kv_lora_rank)
    assert q.dtype == cache_layer.dtype == out.dtype, f"queries {q.dtype}, cache {cache_layer.dtype}, out {out.dtype}"
    assert cache_layer.shape[1] == BLOCK_SIZE, f"cache blocks of {cache_layer.shape[1]} tokens, not {BLOCK_SIZE}"
    assert cache_layer.shape[2] == latent_dim, f"queries of {latent_dim}, latents of {cache_layer.shape[2]}"
    q_row, q_head, _ = q.stride()
    out_row, out_head, _ = out.stride()
    _native.mla_decode(
        q.element_size(),
        q.data_ptr(),
        q_row,
        q_head,
        cache_layer.data_ptr(),
        positions.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        block_tables.element_size(),
        out.data_ptr(),
        out_row,
        out_head,
        num_rows,
        heads,
        latent_dim,
        kv_lora_rank,
        softmax_scale,
    )
    return out


def mla_prefill(
    q: Tensor,
    cache_layer: Tensor,
    kv_b: PackedMatrix,
    start: int,
    num: int,
    block_table: Tensor,
    softmax_scale: float,
    v_head_dim: int,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the positions start .. start + num - 1 of one sequence, whose latents are in the cache.

    q: [num, heads, d_nope + d_rope], cache_layer: [blocks, 64, kv_lora + d_rope] contiguous,
    kv_b: [heads * (d_nope + d_v), kv_lora], block_table: int64 [width], contiguous -> [num, heads, d_v];
    fp32 or bf16, all of one dtype.
    """
    num_rows, heads, q_dim = q.shape
    kv_outputs, kv_lora_rank = kv_b.shape
    if out is None:
        out = q.new_empty(num, heads, v_head_dim)
    d_nope = kv_outputs // heads - v_head_dim
    d_rope = q_dim - d_nope
    assert q.dtype == cache_layer.dtype == out.dtype == kv_b.dtype, f"{q.dtype}, {cache_layer.dtype}, {kv_b.dtype}"
    assert num_rows == num, f"{num_rows} queries for {num} positions"
    assert cache_layer.shape[1:] == (BLOCK_SIZE, kv_lora_rank + d_rope), f"a cache of {tuple(cache_layer.shape)}"
    assert block_table.shape[0] * BLOCK_SIZE >= start + num, f"{block_table.shape[0]} blocks, {start + num} positions"
    q_row, q_head, _ = q.stride()
    out_row, out_head, _ = out.stride()
    _native.mla_prefill(
        q.element_size(),
        q.data_ptr(),
        q_row,
        q_head,
        cache_layer.data_ptr(),
        kv_b.stack.address,
        block_table.data_ptr(),
        start,
        num,
        heads,
        d_nope,
        d_rope,
        v_head_dim,
        kv_lora_rank,
        softmax_scale,
        out.data_ptr(),
        out_row,
        out_head,
    )
    return out
