"""Weighs a token's expert rows together: shared expert first, then slots 0 .. k-1, in fp32 (DESIGN law 5)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def combine_kernel(
    shared_ptr, rows_ptr, weight_ptr, out_ptr, columns, shared_stride, out_stride,
    HAS_SHARED: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_SHARED:
        total = tl.load(shared_ptr + token * shared_stride + column, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        weight = tl.load(weight_ptr + token * SLOTS + slot)
        row = tl.load(rows_ptr + (token * SLOTS + slot) * columns + column, mask=inside, other=0.0).to(tl.float32)
        total = total + row * weight
    tl.store(out_ptr + token * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(shared: Tensor | None, rows: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
    """shared: [M, H] or None, rows: [M, k, H], topk_weights: fp32 [M, k] -> [M, H] in `out`'s dtype, else rows'.

    Rows of shared and out may be strided.
    """
    num_tokens, slots, columns = rows.shape
    out = rows.new_empty(num_tokens, columns) if out is None else out
    if num_tokens:
        block = min(triton.next_power_of_2(columns), 1024)
        combine_kernel[(num_tokens, triton.cdiv(columns, block))](
            shared, rows, topk_weights, out, columns, 0 if shared is None else shared.stride(0), out.stride(0),
            HAS_SHARED=shared is not None, SLOTS=slots, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
