"""What is done row by row between the products, by the native module; defined in reference.py and router/gate.py.

Invariant: a row of the result has the same bits whatever the number and content of the other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .native import IS_BUILT

if IS_BUILT or TYPE_CHECKING:
    from . import _native

METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}  # as gate.cpp numbers them


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x: [M, H], weight: [H] -> [M, H], all of one dtype; computed in fp32."""
    return _rms_norm(x, None, weight, eps, out)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x, delta: [M, H], weight: [H], all of one dtype -> [M, H], the norm of x + delta, to which x is set."""
    return _rms_norm(x, delta, weight, eps, out)


def _rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor | None) -> Tensor:
    num_rows, size = x.shape
    if out is None:
        out = x.new_empty(num_rows, size)
    assert x.dtype == weight.dtype == out.dtype, f"rows {x.dtype}, weight {weight.dtype}, out {out.dtype}"
    _native.rms_norm(
        x.element_size(),
        x.data_ptr(),
        x.stride(0),
        0 if delta is None else delta.data_ptr(),
        0 if delta is None else delta.stride(0),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        out.stride(0),
        num_rows,
        size,
    )
    return out


def gather(table: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """table: [N, W], rows: int64 [M] -> `out` [M, W], row i of which is row rows[i] of the table.

    Torch's index_select costs 3 to 10 us a call between two passes, which is as much as a layer's attention does.
    Raises IndexError for a row that the table does not have.
    """
    (num_rows, width), size = out.shape, out.element_size()
    assert (table.shape[1], table.dtype) == (width, out.dtype), f"{table.dtype} {table.shape} into {out.dtype} {width}"
    assert (rows.shape, rows.dtype) == ((num_rows,), torch.int64), f"rows {rows.dtype} {rows.shape}, out {out.shape}"
    assert table.stride(1) == out.stride(1) == rows.stride(0) == 1, "rows and what is looked up must be contiguous"
    _native.gather(
        table.data_ptr(),
        table.stride(0) * size,
        table.shape[0],
        rows.data_ptr(),
        out.data_ptr(),
        out.stride(0) * size,
        num_rows,
        width * size,
    )
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor | None = None) -> Tensor:
    """x: [M, heads, d], cos, sin: fp32 [M, d] with equal halves -> [M, heads, d] in x's dtype; `out` may be x."""
    num_rows, heads, size = x.shape
    if out is None:
        out = x.new_empty(num_rows, heads, size)
    assert x.dtype == out.dtype, f"rows {x.dtype}, out {out.dtype}"
    assert cos.dtype == sin.dtype == torch.float32, f"cos {cos.dtype}, sin {sin.dtype}"
    x_row, x_head, _ = x.stride()
    out_row, out_head, _ = out.stride()
    _native.rope(
        x.element_size(),
        x.data_ptr(),
        x_row,
        x_head,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        interleaved,
        out.data_ptr(),
        out_row,
        out_head,
        num_rows,
        heads,
        size,
    )
    return out


def write_latents(
    latent: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache_layer: Tensor,
    interleaved: bool,
) -> None:
    """Norms the kv part of latents, turns their rope part, and puts both into the cache.

    latent: [M, kv_lora + d_rope], norm_weight: [kv_lora], cos, sin: fp32 [M, d_rope] with equal halves,
    slots: int64 [M] (block * block size + offset), cache_layer: [blocks, block size, kv_lora + d_rope] contiguous.
    """
    num_rows, latent_dim = latent.shape
    kv_lora_rank = norm_weight.shape[0]
    assert latent.dtype == norm_weight.dtype == cache_layer.dtype, f"latents {latent.dtype}, cache {cache_layer.dtype}"
    assert cache_layer.shape[2] == latent_dim, f"latents of {latent_dim}, a cache of {cache_layer.shape[2]}"
    _native.write_latents(
        latent.element_size(),
        latent.data_ptr(),
        latent.stride(0),
        norm_weight.data_ptr(),
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        slots.data_ptr(),
        cache_layer.data_ptr(),
        interleaved,
        num_rows,
        kv_lora_rank,
        latent_dim - kv_lora_rank,
    )


def combine(shared: Tensor | None, rows: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
    """shared: [M, H] or None, rows: [M, k, H], topk_weights: fp32 [M, k] -> [M, H] in rows' dtype.

    fp32; shared expert first, then slots 0 .. k-1 in that order: `reference.combine` to the bit.
    """
    num_rows, slots, size = rows.shape
    if out is None:
        out = rows.new_empty(num_rows, size)
    assert rows.dtype == out.dtype, f"rows {rows.dtype}, out {out.dtype}"
    assert topk_weights.dtype == torch.float32, f"weights must be fp32, not {topk_weights.dtype}"
    assert shared is None or shared.dtype == rows.dtype, "the shared expert's rows are of another dtype"
    row_stride, slot_stride, _ = rows.stride()
    _native.combine(
        rows.element_size(),
        0 if shared is None else shared.data_ptr(),
        0 if shared is None else shared.stride(0),
        rows.data_ptr(),
        row_stride,
        slot_stride,
        topk_weights.data_ptr(),
        topk_weights.stride(0),
        out.data_ptr(),
        out.stride(0),
        num_rows,
        slots,
        size,
    )
    return out


def route(
    logits: Tensor,
    correction_bias: Tensor | None,
    scoring_func: Literal["sigmoid", "softmax"],
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"],
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """logits: fp32 [M, E], correction_bias: fp32 [E] -> topk_idx int64 [M, k], topk_weights fp32 [M, k], contiguous.

    The experts that router/gate.py chooses, in its order; weights may differ from its in the last bits.
    """
    num_rows, num_experts = logits.shape
    if out is None:
        out = logits.new_empty(num_rows, top_k, dtype=torch.int64), logits.new_empty(num_rows, top_k)
    topk_idx, topk_weights = out
    assert logits.dtype == topk_weights.dtype == torch.float32, f"gate logits must be fp32, not {logits.dtype}"
    assert correction_bias is None or correction_bias.dtype == torch.float32, "the correction bias must be fp32"
    assert top_k <= num_experts, f"the best {top_k} of {num_experts} experts"
    _native.route(
        logits.data_ptr(),
        logits.stride(0),
        0 if correction_bias is None else correction_bias.data_ptr(),
        scoring_func == "softmax",
        METHODS[topk_method],
        num_rows,
        num_experts,
        top_k,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        topk_idx.data_ptr(),
        topk_weights.data_ptr(),
    )
    return out
