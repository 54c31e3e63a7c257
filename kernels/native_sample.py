"""Draws a token from a row of logits by the native module; defined in model/sampler.py, its noise in model/noise.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .native import IS_BUILT

if IS_BUILT or TYPE_CHECKING:
    from . import _native


def draw(
    logits: npt.NDArray[np.float32],
    best: int,
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
    seed: int,
    position: int,
) -> int | None:
    """The token that the definition draws, or None where roundings could decide: then the definition must be asked.

    logits: fp32 [vocab], finite or -inf, `best` the first of the largest; temperature above 0; min_p, top_k: 0 without;
    seed: within 64 bits.
    """
    (vocab,) = logits.shape
    assert logits.dtype == np.float32, f"logits {logits.dtype}"
    assert logits.flags.c_contiguous, f"logits with strides {logits.strides}"
    assert 0 <= best < vocab, f"token {best} of {vocab}"
    least_score = float(np.log(min_p)) if min_p > 0 else -math.inf
    token = _native.draw(
        logits.ctypes.data, vocab, best, temperature, least_score, min(top_k, vocab), top_p, seed, position
    )
    return None if token < 0 else token
