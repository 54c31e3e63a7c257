"""Weighs a token's expert rows together: shared expert first, then slots 0 .. k-1, in fp32 (DESIGN law 5)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def combine_kernel(
    shared_ptr, rows_ptr, weight_ptr, residual_ptr, out_ptr, columns,
    HAS_SHARED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dtype = out_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_SHARED:
        total = tl.load(shared_ptr + token * columns + column, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        weight = tl.load(weight_ptr + token * SLOTS + slot)
        row = tl.load(rows_ptr + (token * SLOTS + slot) * columns + column, mask=inside, other=0.0).to(tl.float32)
        total = total + row * weight
    if HAS_RESIDUAL:  # the sum is rounded before it joins the stream, as the layers do one after the other
        residual = tl.load(residual_ptr + token * columns + column, mask=inside, other=0.0).to(tl.float32)
        total = residual + total.to(dtype).to(tl.float32)
    tl.store(out_ptr + token * columns + column, total.to(dtype), mask=inside)


def combine(
    shared: Tensor | None, rows: Tensor, topk_weights: Tensor, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """shared: [M, H] or None, rows: [M, k, H], topk_weights: fp32 [M, k] -> [M, H] in rows' dtype."""
    num_tokens, slots, columns = rows.shape
    out = rows.new_empty(num_tokens, columns) if out is None else out
    if num_tokens:
        block = min(triton.next_power_of_2(columns), 2048)
        combine_kernel[(num_tokens, triton.cdiv(columns, block))](
            shared, rows, topk_weights, residual, out, columns,
            HAS_SHARED=shared is not None, HAS_RESIDUAL=residual is not None, SLOTS=slots, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
