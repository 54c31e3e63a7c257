"""Counter-based sampling noise: a function of (seed, absolute position, token id) and nothing else (laws 4 and 5).

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") encrypts a counter under a key: no state,
so any worker makes the same noise again after a failure. Key = (seed, STREAM), counter = (1 + token // 4, position,
0, 0), and token t takes lane t % 4 of its block. numpy guarantees the bits of `random_raw`; it steps the counter before
its first block, hence the 1 +. Passes BigCrush; a GPU kernel can make the same words with 64-bit multiply-high.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STREAM = 0x62726169645F7631  # keeps token noise apart from any other use of the same seed
_MASK = 2**64 - 1


Bits = npt.NDArray[np.uint64]


def random_bits(seed: int, position: int, vocab_size: int) -> Bits:
    """[vocab_size] random words; token t's noise is a rising function of word t."""
    # spelled as uint64 arrays: numpy turns a list that mixes small and large integers into floats, and rounds them
    key = np.array([seed & _MASK, STREAM], dtype=np.uint64)
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    bits: Bits = np.random.Philox(key=key, counter=counter).random_raw(vocab_size)
    return bits


def uniform(seed: int, position: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """[vocab_size] numbers in (0, 1)."""
    return _uniform_of(random_bits(seed, position, vocab_size))


def _uniform_of(bits: Bits) -> npt.NDArray[np.float64]:
    """Numbers of 53 bits, strictly inside (0, 1), so that their logarithms are finite."""
    halfway = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.minimum(halfway, 1 - 2.0**-53)  # the sum above rounds: without this the last number would be 1


def gumbel_of(bits: Bits) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise: adding it to log-probabilities and taking the argmax samples them."""
    noise: npt.NDArray[np.float64] = -np.log(-np.log(_uniform_of(bits)))
    return noise
