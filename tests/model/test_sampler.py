"""Sampled tokens follow the exact filtered distribution and never depend on the rest of the batch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from braid.model.noise import gumbel_of, random_bits
from braid.model.sampler import NothingToSample, SampledToken, Sampler, prompt_logprobs
from braid.model.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.5, 0.0, -1.0, -3.0, 1.5])


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], banned: Sequence[int] = ()
) -> list[SampledToken]:
    """One token of every row."""
    sampler = Sampler(logits)
    asked = enumerate(zip(params, positions, strict=True))
    return [sampler.token(row, own, position, banned) for row, (own, position) in asked]


def exact(params: SamplingParams) -> npt.NDArray[np.float64]:
    """The filtered distribution by its definition: no noise, no shortcuts."""
    probs: npt.NDArray[np.float64] = torch.softmax(LOGITS.double() / params.temperature, -1).numpy()
    probs = np.where(probs >= params.min_p * probs.max(), probs, 0)
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    if params.top_k:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    before = 0.0
    for token in order:
        mass = probs[token]
        probs[token] = mass if before < params.top_p else 0
        before += mass
    probs /= probs.sum()
    return probs


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.3),
        SamplingParams(1, temperature=3.0),
        SamplingParams(1, top_k=3),
        SamplingParams(1, top_k=4),  # cuts between two equal logits: the lower id stays
        SamplingParams(1, top_p=0.6),
        SamplingParams(1, min_p=0.2),
        SamplingParams(1, temperature=1.5, top_k=6, top_p=0.85, min_p=0.05),
    ],
)
def test_follows_the_exact_distribution(params: SamplingParams) -> None:
    trials = 6_000
    probs = exact(params)
    counts = np.zeros(len(probs))
    rows = LOGITS.expand(500, -1)
    for start in range(0, trials, 500):
        for token in sample(rows, [params] * 500, range(start, start + 500)):
            counts[token.token_id] += 1
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * trials
    chi2 = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_seeds_and_positions_change_the_draw_and_repeat_it() -> None:
    def draw(seed: int) -> list[int]:
        params = [SamplingParams(1, temperature=2.0, seed=seed)] * 40
        return [token.token_id for token in sample(LOGITS.expand(40, -1), params, range(40))]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) > 3


def test_a_row_is_bitwise_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(33, 997) * 4
    params = [
        SamplingParams(
            1, temperature=(0.0, 0.7, 1.0)[i % 3], top_p=(1.0, 0.9)[i % 2], top_k=i % 5, seed=i, logprobs=i % 4
        )
        for i in range(33)
    ]
    together = sample(logits, params, range(100, 133))
    alone = [sample(logits[i : i + 1], [params[i]], [100 + i])[0] for i in range(33)]
    backwards = sample(logits.flip(0), params[::-1], range(132, 99, -1))[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_looking_only_at_tokens_that_can_win_changes_no_winner(spread: float, temperature: float) -> None:
    logits = torch.randn(200, 3_000, generator=torch.Generator().manual_seed(2)) * spread
    logits[:, 17] = -torch.inf
    params = SamplingParams(1, temperature=temperature, seed=5)
    for row, token in enumerate(sample(logits, [params] * 200, range(200))):
        raw = logits[row].double().numpy()
        scores = (raw - raw.max()) / temperature
        assert token.token_id == int(np.argmax(scores + gumbel_of(random_bits(5, row, 3_000))))


def test_greedy_takes_the_lowest_of_equal_maxima_and_ignores_filters() -> None:
    logits = torch.zeros(3, 300)
    logits[1, [200, 77, 299]] = 5.0
    logits[2, 299] = 1.0
    odd = replace(GREEDY, top_k=1, top_p=0.1, min_p=1.0, seed=9)
    assert [token.token_id for token in sample(logits, [odd] * 3, [1, 2, 3])] == [0, 77, 299]


def test_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    params = SamplingParams(1, temperature=5e-324)
    assert sample(LOGITS[None] * 1e4, [params], [3])[0].token_id == 0


def test_top_p_of_a_flat_large_vocabulary_keeps_a_whole_share() -> None:
    logits = torch.zeros(400, 20_000)
    params = SamplingParams(1, top_p=0.25)
    tokens = [token.token_id for token in sample(logits, [params] * 400, range(400))]
    assert max(tokens) < 5_001
    assert max(tokens) > 4_500


def test_banned_tokens_are_not_sampled_and_logprobs_stay_raw() -> None:
    params = replace(GREEDY, logprobs=1)
    (token,) = sample(LOGITS[None], [params], [0], banned=(0, 7, 5_000))
    raw = torch.log_softmax(LOGITS, -1)
    assert token == SampledToken(1, float(raw[1]), ((0, float(raw[0])),))
    drawn = sample(LOGITS.expand(200, -1), [SamplingParams(1)] * 200, range(200), banned=(0,))
    assert 0 not in {token.token_id for token in drawn}


def test_logprobs_rank_equal_tokens_by_id_and_ignore_temperature() -> None:
    params = SamplingParams(1, temperature=0.01, logprobs=4)
    (token,) = sample(LOGITS[None], [params], [0])
    raw = torch.log_softmax(LOGITS, -1)
    assert [token_id for token_id, _ in token.top] == [0, 7, 1, 2]
    assert token.logprob == float(raw[token.token_id])
    assert sample(LOGITS[None], [replace(params, logprobs=0)], [0])[0].top == ()
    assert sample(LOGITS[None], [replace(params, logprobs=None)], [0])[0].logprob is None


def test_prompt_logprobs_are_those_of_the_given_tokens() -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 50)
    targets = torch.tensor([3, 1, 4, 1, 5])
    raw = torch.log_softmax(logits.double(), -1)
    for row, token in enumerate(prompt_logprobs(logits, targets, 2)):
        assert token.token_id == int(targets[row])
        assert token.logprob == pytest.approx(float(raw[row, targets[row]]), abs=1e-5)
        assert [token_id for token_id, _ in token.top] == raw[row].topk(2).indices.tolist()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_logits_are_named_by_position(poison: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = poison
    sampler = Sampler(logits)
    with pytest.raises(FloatingPointError, match=r"positions \[18\]"):
        sampler.token(1, GREEDY, 18)
    assert not sampler.is_finite(1)
    assert [sampler.token(row, GREEDY, 17 + row).token_id for row in (0, 2)] == [0, 0]
    with pytest.raises(NothingToSample, match=r"positions \[1\]"):
        prompt_logprobs(logits, torch.tensor([0, 0, 0]), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: use 1 or more, or ask for log-probabilities"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5: use an integer"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": -0.1}, r"temperature is -0.1: use 0 \(greedy\)"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, r"top_p is 0.0: use a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1: use 1 to 2147483647; 0 is off"),
        ({"top_k": 2**64}, "top_k is 18446744073709551616"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": "a"}, "min_p is 'a': use a number"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"min_tokens": 9}, r"min_tokens is 9: use 0 to max_tokens \(4\)"),
        ({"stop_token_ids": (3, -1)}, "stop_token_ids is -1: use ids from 0"),
        ({"stop_token_ids": (2**64,)}, "stop_token_ids is 18446744073709551616"),
        ({"stop_token_ids": (3,) * 1025}, "stop_token_ids is '1025 ids': use at most 1024"),
        ({"logprobs": 21}, "logprobs is 21: use 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ],
)
def test_bad_parameters_are_named_with_a_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SamplingParams(max_tokens=4), **change).check()


def test_scoring_alone_may_ask_for_no_tokens() -> None:
    SamplingParams(max_tokens=0, prompt_logprobs=0).check()


def test_wire_form_comes_back_the_same_and_refuses_the_unknown() -> None:
    params = SamplingParams(5, 0.5, 0.9, 3, 0.1, -7, 2, True, (1, 2), 3, 0)
    assert SamplingParams.from_wire({**params.to_wire(), "stop_token_ids": [1, 2]}) == params
    with pytest.raises(ValueError, match="temprature"):
        SamplingParams.from_wire({"max_tokens": 1, "temprature": 1.0})


def test_end_tokens_are_banned_until_min_tokens_are_out() -> None:
    params = SamplingParams(8, min_tokens=3, stop_token_ids=(9,))
    assert params.banned_ids(2, (1, 2)) == (1, 2, 9)
    assert params.banned_ids(3, (1, 2)) == ()
    assert replace(params, ignore_eos=True).stop_ids((1, 2)) == {9}
