"""A matrix for each head: W_UK, which brings queries to the latent space, and W_UV, which brings latents back.

Bf16, weights on the tensor core's M side as in gemm.py. The matrices may be views of kv_b_proj, whichever way they lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .splits import in_sixteens, token_tile

DEPTH = 64
FEW_OUTPUTS = 128  # a head's product of so few outputs is cut into tiles of 64, so that 128 heads fill 132 SMs


@triton.jit(do_not_specialize=["M"])
def head_kernel(
    x_ptr, w_ptr, out_ptr, M, N, K, x_row, x_head, w_head, w_row, w_depth, out_row, out_head,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    head = tl.program_id(2).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    x_rows = x_ptr + head * x_head + row.to(tl.int64)[:, None] * x_row
    w_rows = w_ptr + head * w_head + output.to(tl.int64)[:, None] * w_row
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for start in tl.range(0, K, DEPTH):
        inside = start + depth < K
        x = tl.load(x_rows + (start + depth)[None, :], mask=(row < M)[:, None] & inside[None, :], other=0.0)
        w_mask = (output < N)[:, None] & inside[None, :]
        w = tl.load(w_rows + (start + depth)[None, :] * w_depth, mask=w_mask, other=0.0)
        total = tl.dot(w, x.T, total)
    where = out_ptr + head * out_head + row.to(tl.int64)[:, None] * out_row + output[None, :]
    tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (output < N)[None, :])


def head_linear(x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """x: bf16 [M, heads, K], weights: bf16 [heads, N, K] -> [M, heads, N] in `out`'s dtype, bf16 if not given.

    Strides are free, but that the last one of x and of out is 1.
    """
    (num_rows, num_heads, depth), num_outputs = x.shape, weights.shape[1]
    if out is None:
        out = torch.empty(num_rows, num_heads, num_outputs, dtype=torch.bfloat16, device=x.device)
    if num_rows == 0:
        return out
    tokens, outputs = token_tile(num_rows), 64 if num_outputs <= FEW_OUTPUTS else 128
    strides = *x.stride()[:2], *(stride for stride in weights.stride() if stride != 1)
    if not in_sixteens(depth, num_outputs, *strides, x.data_ptr(), weights.data_ptr()):
        tokens, outputs = 16, 64
    head_kernel[(triton.cdiv(num_rows, tokens), triton.cdiv(num_outputs, outputs), num_heads)](
        x, weights, out, num_rows, num_outputs, depth, x.stride(0), x.stride(1), *weights.stride(),
        out.stride(0), out.stride(1), TOKENS=tokens, OUTPUTS=outputs, DEPTH=DEPTH,
        num_warps=8 if tokens == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out
