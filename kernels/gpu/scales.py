"""Scales of fp8 groups: what every kernel that quantises activations shares.

An activation group is 128 columns of one row (DeepSeek-V3 paper, section 3.3.2): its scale depends on that row alone.
Divisions are rounded correctly, as a GPU's fast one would miss exact powers of two and move codes that are ties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(1e-4)  # of DeepSeek's own kernel: a group of zeros gets a scale all the same


@triton.jit
def group_scale(amax, UE8M0: tl.constexpr):
    """fp32 largest magnitudes -> fp32 scales; `UE8M0`: rounded up to a power of two (config key scale_fmt)."""
    scale = tl.div_rn(tl.maximum(amax, SMALLEST_AMAX), tl.full(amax.shape, E4M3_MAX, tl.float32))
    if UE8M0:
        # On the bits, as log2 and exp2 are not exact on a GPU; SMALLEST_AMAX keeps the scale normal.
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def group_codes(values, scale):
    """fp32 values and the scale of each -> e4m3."""
    return tl.clamp(tl.div_rn(values, scale), -E4M3_MAX, E4M3_MAX).to(tl.float8e4nv)


def num_groups(columns: int) -> int:
    """Scales that a row of `columns` numbers has."""
    return triton.cdiv(columns, GROUP)
