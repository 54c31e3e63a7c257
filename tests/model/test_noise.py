"""The noise is Philox4x64-10 as published, uniform, and unrelated across tokens, positions and seeds."""

import numpy as np
import numpy.typing as npt
import pytest

from braid.model.noise import STREAM, gumbel_of, random_bits, uniform

MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 written from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(product1 >> 64) ^ c[1] ^ k[0], product1 & MASK, (product0 >> 64) ^ c[3] ^ k[1], product0 & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def chi_square(counts: npt.NDArray[np.int64]) -> float:
    """In standard deviations above the mean of the chi-square distribution of a flat histogram."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_the_oracle_gives_the_published_vector() -> None:
    assert philox([0] * 4, [0] * 2)[0] == 0x16554D9ECA36314C


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 5), (-1, 163839), (2**63 - 1, 1), (-(2**63), 7)])
def test_token_t_takes_lane_t_mod_4_of_block_t_div_4(seed: int, position: int) -> None:
    noise = uniform(seed, position, 11)
    for token in range(11):
        word = philox([1 + token // 4, position, 0, 0], [seed & MASK, STREAM])[token % 4]
        assert noise[token] == ((word >> 11) + 0.5) / 2**53


def test_noise_of_a_token_does_not_depend_on_the_vocabulary_or_on_the_tokens_asked_for() -> None:
    assert np.array_equal(uniform(3, 4, 1000)[:10], uniform(3, 4, 10))
    bits = random_bits(3, 4, 100)
    everything = gumbel_of(bits)
    assert np.array_equal(gumbel_of(bits[[7, 93]]), everything[[7, 93]])
    assert np.array_equal(everything, -np.log(-np.log(uniform(3, 4, 100))))
    assert np.isfinite(everything).all()
    assert np.array_equal(np.argsort(bits), np.argsort(everything)), "the noise rises with its word"


def test_the_largest_word_makes_finite_noise() -> None:
    least, largest = gumbel_of(np.array([0, MASK], dtype=np.uint64))
    assert -4 < least < 0
    assert 36 < largest < 37


def test_uniform_over_tokens_positions_and_seeds() -> None:
    over_tokens = uniform(11, 12, 100_000)
    over_positions = np.concatenate([uniform(11, position, 8) for position in range(4_000)])
    over_seeds = np.concatenate([uniform(seed, 12, 8) for seed in range(4_000)])
    for sample in (over_tokens, over_positions, over_seeds):
        assert ((sample > 0) & (sample < 1)).all()
        assert abs(chi_square(np.histogram(sample, 64, (0, 1))[0])) < 4


@pytest.mark.parametrize("step", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, -1, 0)])
def test_neighbours_are_independent(step: tuple[int, int, int]) -> None:
    """Joint histogram of the noise of (seed, position, token) and of its neighbour is flat."""
    d_seed, d_position, d_token = step
    pairs = [
        (uniform(seed, position, 40)[:39], uniform(seed + d_seed, position + d_position, 40)[d_token : 39 + d_token])
        for seed in range(20)
        for position in range(1, 41)
    ]
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    assert abs(chi_square(np.histogram2d(first, second, 12, [[0, 1], [0, 1]])[0])) < 4
