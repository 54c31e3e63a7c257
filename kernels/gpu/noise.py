"""The sampling noise of model/noise.py on a GPU, word for word: Philox4x64-10 of seed, position and token id."""

from __future__ import annotations

import triton
import triton.language as tl

STREAM = tl.constexpr(0x62726169645F7631)
MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)
MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)
BELOW_ONE = tl.constexpr(1 - 2.0**-53)
LARGEST_GUMBEL = tl.constexpr(36.8)  # of any word: -log(-log(BELOW_ONE)) and a little


@triton.jit
def random_bits(seed, position, first_token, TOKENS: tl.constexpr):
    """uint64 [TOKENS] words of tokens first_token .. (a multiple of 4): a block of four tokens comes in one piece."""
    block = first_token // 4 + tl.arange(0, TOKENS // 4)
    c0 = (1 + block).to(tl.uint64)
    c1 = tl.zeros_like(c0) + position.to(tl.uint64)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    key_0 = seed.to(tl.uint64, bitcast=True)
    key_1 = tl.full((), STREAM, tl.uint64)
    m0 = tl.full(c0.shape, MULTIPLIER_0, tl.uint64)
    m1 = tl.full(c0.shape, MULTIPLIER_1, tl.uint64)
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(m0, c0), m0 * c0
        high_1, low_1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += tl.full((), WEYL_0, tl.uint64)
        key_1 += tl.full((), WEYL_1, tl.uint64)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (TOKENS,))


@triton.jit
def gumbel_of(bits):
    """float64 noise that rises with the word: of 53 bits, strictly inside (0, 1) before the logarithms."""
    uniform = ((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return -tl.log(-tl.log(tl.minimum(uniform, BELOW_ONE)))
