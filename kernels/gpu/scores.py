"""What the sampling kernels share: scores of logits as model/sampler.py has them, and keys that sort as logits do."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(logit):
    """int64 from 1 to 2**32 - 1 that sort as the floats do; -0.0 counts as 0.0."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000


@triton.jit
def logit_of(key):
    """What `ordered` made the key of."""
    bits = (key - 0x80000000).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def highest_logit(peak_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(peak_ptr + row * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf")), 0)


@triton.jit
def is_drawn(highest, temperature):
    return (temperature > 0.0) & (highest > float("-inf")) & (highest < float("inf"))


@triton.jit
def scores_of(logit, highest, temperature, min_p):
    """float64 scores, and which tokens are in the running at all."""
    score = (logit.to(tl.float64) - highest.to(tl.float64)) / temperature
    is_in = score > float("-inf")
    if min_p > 0.0:
        is_in = is_in & (score >= tl.log(min_p))
    return score, is_in
