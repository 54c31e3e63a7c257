"""Drafts verified over Markov chains: what is answered follows the target's distribution, drafts come true as often as
two Gumbel races over the same noise are won by the same token."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from markov_engines import Make, chain, loops

from braid.model.sampling_params import SamplingParams

Table = npt.NDArray[np.float64]


@pytest.fixture
def make() -> Iterator[Make]:
    with loops() as made:
        yield made


def probabilities(logits: torch.Tensor, temperature: float = 1.0) -> Table:
    table: Table = torch.softmax(logits.double() / temperature, -1).numpy()
    return table


def coupled(p: Table, q: Table) -> list[float]:
    """Chance of each token to win two Gumbel races over the same noise, one for each distribution."""
    return [float(1 / np.maximum(p / p[i], q / q[i]).sum()) for i in range(len(p))]


def few_tokens(seed: int, spread: float) -> torch.Tensor:
    """Only tokens 0 to 3 ever come."""
    table: torch.Tensor = chain(seed, spread)
    table[:, 4:] = -torch.inf
    return table


def test_drafted_output_has_the_targets_distribution(make: Make) -> None:
    """Chi-square of all triples of tokens over fixed seeds, against the exact product of the chain."""
    target = few_tokens(1, 0.7)
    drafter = target + few_tokens(2, 0.8).clamp(min=-9)
    loop, num_seeds = make(target, drafter), 2400
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, num_seeds, 16):
        requests = [(3, SamplingParams(4, temperature=1.0, seed=first + i, ignore_eos=True)) for i in range(16)]
        for answer in loop.ask(requests):
            counts[tuple(answer.tokens[index] for index in range(1, 4))] += 1
    assert 0.3 < loop.drafter.num_accepted / loop.drafter.num_drafted < 0.9, "drafts must come true and fail"
    p = probabilities(target)
    start = p[5]  # the prompt's last token
    chi2, cells = 0.0, 0
    for triple in itertools.product(range(4), repeat=3):
        a, b, c = triple
        expected = num_seeds * float((start @ p[:, a]) * p[a, b] * p[b, c])
        chi2 += (counts[triple] - expected) ** 2 / expected
        cells += 1
        assert expected > 3, "too few seeds for this cell"
    freedom = cells - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def mean_over_steps(target: Table, both: Table, accepted: Table) -> float:
    """Mean of `accepted` (by the token before the draft) in the long run of steps that verify one draft each.

    both[i, j]: after token i, target and draft are both j. Then a token for free follows; else the target's j ends it.
    """
    turn = (target - both) + both @ target
    values, vectors = np.linalg.eig(turn.T)
    shares = np.real(vectors[:, np.argmax(np.real(values))])
    return float(shares @ accepted / shares.sum())


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_acceptance_is_that_of_coupled_races_and_close_to_rejection_samplings(make: Make, noise: float) -> None:
    target = few_tokens(1, 1.0)
    drafter = target + few_tokens(2, noise).clamp(min=-9)
    loop = make(target, drafter, 1)
    for first in range(0, 240, 16):
        loop.ask([(3, SamplingParams(20, temperature=1.0, seed=first + i, ignore_eos=True)) for i in range(16)])
    measured = loop.drafter.num_accepted / loop.drafter.num_drafted
    p, q = probabilities(target)[:4, :4], probabilities(drafter)[:4, :4]
    both = np.array([coupled(p[i], q[i]) for i in range(4)])
    races = mean_over_steps(p, both, both.sum(1))
    rejection = mean_over_steps(p, both, np.minimum(p, q).sum(1))
    assert abs(measured - races) < 4 * np.sqrt(races * (1 - races) / loop.drafter.num_drafted)
    assert rejection / (2 - rejection) <= races <= rejection
