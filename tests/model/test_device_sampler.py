"""Sampling on a device, here in Triton's interpreter: the tokens that the CPU's sampler picks from the same logits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from torch import Tensor

from braid.model.device_sampler import DeviceSampler
from braid.model.row_sampler import sampler_for
from braid.model.sampler import Ask, NothingToSample, Sampler
from braid.model.sampling_params import SamplingParams

triton_interpreter.repair()

VOCAB = 5000  # more than one chunk of the kernels
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)
DRAWN = replace(GREEDY, temperature=0.8, seed=7)


def logits_of(num_rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def mixed_params(count: int) -> list[SamplingParams]:
    rng = random.Random(3)
    return [
        replace(
            GREEDY,
            temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 40]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.05]),
            seed=rng.randrange(-(2**63), 2**63),
            logprobs=rng.choice([None, None, 2]),
        )
        for _ in range(count)
    ]


def asks_of(params: list[SamplingParams], banned: dict[int, tuple[int, ...]] | None = None) -> list[Ask]:
    return [Ask(row, each, 100 + 7 * row, (banned or {}).get(row, ())) for row, each in enumerate(params)]


def assert_like_the_cpu(logits: Tensor, asks: list[Ask]) -> None:
    cpu, device = Sampler(logits), DeviceSampler(logits, asks)
    for ask in asks:
        assert device.token(ask.row, ask.params, ask.position, ask.banned) == cpu.token(
            ask.row, ask.params, ask.position, ask.banned
        )
        assert device.choose(ask.row, ask.params, ask.position, ask.banned) == cpu.choose(
            ask.row, ask.params, ask.position, ask.banned
        )


def test_greedy_rows() -> None:
    logits = logits_of(3)
    logits[1, [17, 4900]] = 50.0  # the first of equal ones
    assert_like_the_cpu(logits, asks_of([GREEDY] * 3))


def test_rows_of_all_kinds_in_one_launch() -> None:
    params = mixed_params(16)
    assert {each.temperature > 0 for each in params} == {True, False}
    best = int(logits_of(16)[3].argmax())
    assert_like_the_cpu(logits_of(16), asks_of(params, {3: (best,), 8: (0, VOCAB + 5)}))


def test_a_part_of_the_rows_in_any_order() -> None:
    logits, drawn = logits_of(6), replace(DRAWN, logprobs=3)
    assert_like_the_cpu(logits, [Ask(4, drawn, 11), Ask(1, GREEDY, 3), Ask(5, DRAWN, 9, (2, 3))])
    assert_like_the_cpu(logits, [Ask(0, DRAWN, 11), Ask(1, DRAWN, 12)])
    assert_like_the_cpu(logits, [Ask(2, DRAWN, 11, (1,))])
    assert_like_the_cpu(logits, [])


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_logits_without_sense_cost_their_own_row_only(params: SamplingParams) -> None:
    logits = logits_of(4)
    logits[0, 4321] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    device = DeviceSampler(logits, asks_of([params] * 4))
    for row in range(3):
        with pytest.raises(NothingToSample, match="at positions \\[9\\]"):
            device.choose(row, params, 9)
        assert not device.is_finite(row)
    assert device.choose(3, params, 121) == Sampler(logits).choose(3, params, 121)


def test_where_everything_is_banned_the_logits_were_good() -> None:
    logits, banned = logits_of(1)[:, :8].contiguous(), tuple(range(8))
    device = DeviceSampler(logits, [Ask(0, DRAWN, 5, banned)])
    with pytest.raises(NothingToSample):
        device.choose(0, DRAWN, 5, banned)
    assert device.is_finite(0) == Sampler(logits).is_finite(0)


def test_logits_of_the_cpu_are_sampled_there() -> None:
    def never() -> list[Ask]:
        raise AssertionError("nobody needs to know beforehand")

    assert isinstance(sampler_for(logits_of(1), never), Sampler)
