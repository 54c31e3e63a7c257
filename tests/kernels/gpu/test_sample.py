"""Sampling against model/sampler.py on the same logits: the same token, whatever is asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from braid.kernels.gpu import filters, noise, sample
from braid.kernels.gpu.sample import SamplingRows
from braid.model.noise import gumbel_of, random_bits
from braid.model.sampler import NothingToSample, Sampler
from braid.model.sampling_params import SamplingParams


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "CHUNK", 32)
    monkeypatch.setattr(sample, "TILE", 16)
    monkeypatch.setattr(filters, "TILE", 16)


def rows_of(params: list[SamplingParams], positions: list[int]) -> SamplingRows:
    def wide(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return SamplingRows(
        wide([p.temperature for p in params]),
        wide([p.min_p for p in params]),
        wide([p.top_p for p in params]),
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.seed for p in params]),
        torch.tensor(positions),
    )


def chosen(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
    has_top_k, has_top_p = any(p.top_k for p in params), any(p.top_p < 1 for p in params)
    tokens: list[int] = sample.sample(logits, rows_of(params, positions), has_top_k, has_top_p).tolist()
    return tokens


def expected(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
    sampler, tokens = Sampler(logits), []
    for row, (p, position) in enumerate(zip(params, positions, strict=True)):
        try:
            tokens.append(sampler.choose(row, p, position))
        except NothingToSample:
            tokens.append(-1)
    return tokens


def asking(generator: random.Random, **fixed: float) -> SamplingParams:
    asked = {
        "temperature": generator.choice([0.0, 0.5, 1.0, 2.0]),
        "top_k": generator.choice([0, 1, 2, 5, 30, 100]),
        "top_p": generator.choice([1.0, 0.2, 0.7, 0.95, 0.9999999]),
        "min_p": generator.choice([0.0, 0.0, 0.05, 1.0]),
        "seed": generator.randrange(-(2**63), 2**63),
    }
    return SamplingParams(max_tokens=1, **{**asked, **fixed})  # type: ignore[arg-type]


def some_logits(rows: int, vocab: int, seed: int) -> Tensor:
    """Every other row has ties; some tokens cannot be sampled."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2
    logits[::2] = logits[::2].round()
    logits[::3, 3:7] = float("-inf")
    return logits


def check(logits: Tensor, params: list[SamplingParams], generator: random.Random) -> None:
    positions = [generator.randrange(2**20) for _ in params]
    assert chosen(logits, params, positions) == expected(logits, params, positions)


@triton.jit  # type: ignore[untyped-decorator]
def noise_kernel(bits_ptr, gumbel_ptr, seed_ptr, position_ptr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0) * TOKENS
    bits = noise.random_bits(tl.load(seed_ptr), tl.load(position_ptr), first, TOKENS)
    tl.store(bits_ptr + first + tl.arange(0, TOKENS), bits)
    tl.store(gumbel_ptr + first + tl.arange(0, TOKENS), noise.gumbel_of(bits))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-1, 163839), (2**62 + 3, 2**40)])
def test_noise_is_that_of_the_cpu_word_for_word(seed: int, position: int) -> None:
    bits, gumbel = torch.zeros(64, dtype=torch.uint64), torch.zeros(64, dtype=torch.float64)
    noise_kernel[(2,)](bits, gumbel, torch.tensor([seed]), torch.tensor([position]), TOKENS=32)
    words = random_bits(seed, position, 64)
    assert np.array_equal(bits.numpy(), words)
    np.testing.assert_allclose(gumbel.numpy(), gumbel_of(words), rtol=1e-14)
    largest = np.array([2**64 - 1], dtype=np.uint64)
    assert 36 < gumbel_of(largest)[0] < noise.LARGEST_GUMBEL.value


def test_greedy_takes_the_first_of_equals() -> None:
    logits = some_logits(6, 70, 0)
    logits[2, [40, 69]] = 50.0
    logits[4] = 1.0
    assert sample.greedy(logits).tolist() == logits.numpy().argmax(-1).tolist()


def test_temperature_alone_draws_as_the_cpu_does() -> None:
    generator = random.Random(1)
    logits = some_logits(24, 90, 1)
    check(logits, [asking(generator, top_k=0, top_p=1.0) for _ in logits], generator)


def test_filters_leave_what_the_cpu_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "DIGIT_BITS", 8)
    monkeypatch.setattr(filters, "TILE", 32)
    generator = random.Random(2)
    logits = some_logits(32, 32, 2)
    check(logits, [asking(generator) for _ in logits], generator)


def test_filters_in_digits_of_five_bits_over_several_chunks() -> None:
    generator = random.Random(3)
    logits = some_logits(4, 40, 3)
    check(logits, [asking(generator, temperature=1.0) for _ in logits], generator)


def seed_for(winner: int, logits: Tensor, position: int) -> int:
    """One with which this token would win if nothing were filtered."""
    scores = logits.double().numpy()
    return next(
        seed
        for seed in range(10**6)
        if int((scores + gumbel_of(random_bits(seed, position, len(scores)))).argmax()) == winner
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "num_ties"),
    [
        (34, 1.0, 33),
        (0, 0.5, 19),  # of 1 + 39 / e, half is reached with 1 + 19 / e
        (20, 0.5, 9),  # of 1 + 19 / e
    ],
)
def test_only_the_first_ties_at_the_edge_are_left(top_k: int, top_p: float, num_ties: int) -> None:
    logits = torch.zeros(40)
    logits[38] = 1.0
    seeds = [seed_for(winner, logits, 7) for winner in (num_ties - 1, num_ties)]  # the last that is left, the next one
    params = [SamplingParams(max_tokens=1, temperature=1.0, top_k=top_k, top_p=top_p, seed=seed) for seed in seeds]
    tokens = chosen(logits.expand(2, -1), params, [7, 7])
    assert tokens == expected(logits.expand(2, -1), params, [7, 7])
    assert tokens[0] == num_ties - 1
    assert tokens[1] != num_ties


def test_rows_that_give_nothing_are_marked_and_harm_no_other() -> None:
    generator = random.Random(5)
    logits = some_logits(5, 40, 5)
    logits[0, 35], logits[1, 2], logits[2] = torch.nan, torch.inf, float("-inf")
    params = [asking(generator, temperature=temperature) for temperature in (1.0, 1.0, 1.0, 1.0, 0.0)]
    positions = [3, 5, 7, 2**33, 11]
    tokens = chosen(logits, params, positions)
    assert tokens[:3] == [-1, -1, -1]
    assert tokens == expected(logits, params, positions)
    assert sample.greedy(logits)[:3].tolist() == [-1, -1, -1]
    assert chosen(logits[3:4], params[3:4], positions[3:4]) == tokens[3:4]


def test_a_tiny_temperature_leaves_the_best_token() -> None:
    logits = some_logits(2, 40, 6)
    params = [SamplingParams(max_tokens=1, temperature=1e-308, top_p=0.9, top_k=3) for _ in logits]
    with np.errstate(over="ignore"):  # scores become -inf: the right limit
        assert chosen(logits, params, [1, 2]) == logits.argmax(-1).tolist()
