"""The next token of every row: the largest logit, or Gumbel-max over what min_p, top_k and top_p leave.

The noise is that of model/noise.py (Philox4x64-10 of seed, position and token id) and the scores are float64 as there,
so a GPU picks what a CPU picks from the same logits. Sums over the vocabulary go chunk by chunk in a fixed order, and
ties rank the lower id first: a row's token follows from its own logits and parameters alone (DESIGN laws 4 and 5).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
STREAM = tl.constexpr(0x62726169645F7631)
MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)
MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)


@triton.jit
def uniform(seed, position, token):
    """float64 strictly inside (0, 1): 53 bits of lane token % 4 of the block for token // 4."""
    c0 = (1 + token // 4).to(tl.uint64)
    c1 = tl.zeros_like(c0) + position.to(tl.uint64)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    key_0 = seed
    key_1 = tl.full((), STREAM, tl.uint64)
    m0 = tl.full(c0.shape, MULTIPLIER_0, tl.uint64)
    m1 = tl.full(c0.shape, MULTIPLIER_1, tl.uint64)
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(m0, c0), m0 * c0
        high_1, low_1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += tl.full((), WEYL_0, tl.uint64)
        key_1 += tl.full((), WEYL_1, tl.uint64)
    lane = token % 4
    bits = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    return ((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit
def ordered(logit):
    """int32 that sort as the floats do; -0.0 counts as 0.0."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def greedy_kernel(logit_ptr, token_ptr, stride, V, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    for start in range(0, V, CHUNK):
        column = start + tl.arange(0, CHUNK)
        logit = tl.load(logit_ptr + row * stride + column, mask=column < V, other=float("-inf"))
        highest = tl.max(logit, 0)
        if highest > best:  # strictly: the first of equal maxima stays
            token = start + tl.argmax(logit, 0)
            best = highest
    tl.store(token_ptr + row, token)


@triton.jit
def measure(logits, V, least, highest, temperature, WEIGHS: tl.constexpr, CHUNK: tl.constexpr):
    """How many tokens have a key of at least `least`, or (WEIGHS) what exp(score) they add up to. float64."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, V, CHUNK):
        column = start + tl.arange(0, CHUNK)
        logit = tl.load(logits + column, mask=column < V, other=float("-inf"))
        counts = (ordered(logit) >= least) & (logit > float("-inf"))
        if WEIGHS:
            mass = tl.exp((logit.to(tl.float64) - highest) / temperature)
            total += tl.sum(tl.where(counts, mass, 0.0), 0)
        else:
            total += tl.sum(counts.to(tl.float64), 0)
    return total


@triton.jit
def threshold(logits, V, wanted, floor, highest, temperature, WEIGHS: tl.constexpr, CHUNK: tl.constexpr):
    """The largest key t from `floor` up with measure(t) >= wanted, by bisection; `floor` if even that has less."""
    low = floor.to(tl.int64)
    high = tl.full((), 0x7FFFFFFF, tl.int64)
    for _ in range(32):
        middle = (low + high + 1) // 2
        enough = measure(logits, V, middle.to(tl.int32), highest, temperature, WEIGHS, CHUNK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
    return low.to(tl.int32)


@triton.jit
def sample_kernel(
    logit_ptr, token_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, seed_ptr, position_ptr, stride, V,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Keeps tokens of key > `least`, and of those that tie with it the first `ties` by id."""
    row = tl.program_id(0).to(tl.int64)
    logits = logit_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    seed = tl.load(seed_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(position_ptr + row)
    best = tl.full((), float("-inf"), tl.float32)
    for start in range(0, V, CHUNK):
        column = start + tl.arange(0, CHUNK)
        best = tl.maximum(best, tl.max(tl.load(logits + column, mask=column < V, other=float("-inf")), 0))
    highest = best.to(tl.float64)
    least = tl.full((), -0x7FFFFFFF, tl.int32)
    ties = tl.full((), 0x7FFFFFFF, tl.int32)
    if min_p > 0.0:  # the least key whose score reaches log(min_p): the scores rise with the keys
        bound = tl.log(min_p)
        low = least.to(tl.int64)
        high = ordered(best).to(tl.int64)
        for _ in range(32):
            middle = (low + high) // 2
            bits = middle.to(tl.int32)
            value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
            reaches = (value.to(tl.float64) - highest) / temperature >= bound
            high = tl.where(reaches, middle, high)
            low = tl.where(reaches, low, tl.minimum(middle + 1, high))
        least = high.to(tl.int32)
    if top_k > 0:
        if measure(logits, V, least, highest, temperature, False, CHUNK) > top_k:
            least = threshold(logits, V, top_k.to(tl.float64), least, highest, temperature, False, CHUNK)
            above = measure(logits, V, least + 1, highest, temperature, False, CHUNK)
            ties = top_k - above.to(tl.int32)
    if top_p < 1.0:
        value = tl.where(least < 0, least ^ 0x7FFFFFFF, least).to(tl.float32, bitcast=True)
        tied = measure(logits, V, least, highest, temperature, False, CHUNK)
        tied -= measure(logits, V, least + 1, highest, temperature, False, CHUNK)
        dropped = tl.maximum(tied - ties.to(tl.float64), 0.0)
        total = measure(logits, V, least, highest, temperature, True, CHUNK)
        if dropped > 0.0:
            total -= dropped * tl.exp((value.to(tl.float64) - highest) / temperature)
        wanted = top_p * total
        narrower = threshold(logits, V, wanted, least, highest, temperature, True, CHUNK)
        if narrower > least:
            least = narrower
            ties = tl.full((), 0x7FFFFFFF, tl.int32)
        value = tl.where(least < 0, least ^ 0x7FFFFFFF, least).to(tl.float32, bitcast=True)
        mass = tl.exp((value.to(tl.float64) - highest) / temperature)
        above = measure(logits, V, least + 1, highest, temperature, True, CHUNK)
        if mass > 0.0:
            needed = tl.maximum(tl.ceil((wanted - above) / mass), 1.0)
            ties = tl.minimum(ties, tl.minimum(needed, 2.0e9).to(tl.int32))
    chosen = tl.full((), 0, tl.int32)
    top = tl.full((), float("-inf"), tl.float64)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, V, CHUNK):
        column = start + tl.arange(0, CHUNK)
        logit = tl.load(logits + column, mask=column < V, other=float("-inf"))
        key = ordered(logit)
        at_edge = (key == least) & (logit > float("-inf"))
        rank = seen + tl.cumsum(at_edge.to(tl.int32), 0)
        kept = (logit > float("-inf")) & ((key > least) | (at_edge & (rank <= ties)))
        score = (logit.to(tl.float64) - highest) / temperature - tl.log(-tl.log(uniform(seed, position, column)))
        score = tl.where(kept, score, float("-inf"))
        best_score = tl.max(score, 0)
        if best_score > top:
            chosen = start + tl.argmax(score, 0)
            top = best_score
        seen += tl.sum(at_edge.to(tl.int32), 0)
    tl.store(token_ptr + row, chosen)


def greedy(logits: Tensor) -> Tensor:
    """logits: fp32 [R, vocab] -> int32 [R], the lowest id among equal maxima."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    if logits.shape[0]:
        greedy_kernel[(logits.shape[0],)](logits, tokens, logits.stride(0), logits.shape[1], CHUNK=CHUNK, num_warps=8)
    return tokens


def sample(
    logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """logits: fp32 [R, vocab]; float64 [R] temperature (> 0), min_p (0: off), top_p (1: off); int32 [R] top_k (0: off);
    int64 [R] seeds and absolute positions of the new tokens -> int32 [R]."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    if logits.shape[0]:
        sample_kernel[(logits.shape[0],)](
            logits, tokens, temperature, min_p, top_k, top_p, seeds, positions, logits.stride(0), logits.shape[1],
            CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    return tokens
