"""How many micro-batches a step gets, under virtual time: what is faster is found, kept, and left when it is not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from braid.actors.overlap import FIRST_PAUSE, LAST_PAUSE, MOST, TRIAL_STEPS, Overlap


def run(
    overlap: Overlap, steps: int, seconds: Callable[[int], float], rows: int = 32, waited: float = 0.5
) -> list[int]:
    """Runs steps whose time depends on their number of micro-batches; returns what was chosen for each."""
    chosen = []
    for _ in range(steps):
        count = overlap.choose(0, rows)
        assert 1 <= count <= min(MOST, rows)
        took = seconds(count)
        overlap.observe(0, rows, count, took, waited * took)
        chosen.append(count)
    return chosen


@pytest.mark.parametrize("best", range(1, MOST + 1))
def test_the_fastest_number_is_found_and_kept(best: int) -> None:
    overlap = Overlap()
    chosen = run(overlap, 3000, lambda count: 1.0 + 0.2 * abs(count - best))
    assert chosen[0] == 1
    assert chosen[-500:].count(best) > 480


def test_noise_does_not_make_it_waver() -> None:
    rng = random.Random(3)
    chosen = run(Overlap(), 4000, lambda count: (1.0 if count == 2 else 1.2) * (1 + rng.expovariate(5)))
    assert chosen[-2000:].count(2) > 1800


def test_what_hardly_gains_is_not_taken() -> None:
    chosen = run(Overlap(), 2000, lambda count: 0.99 if count == 2 else 1.0)
    assert chosen.count(2) < 2000 // 20


def test_where_nothing_is_waited_for_nothing_is_tried() -> None:
    assert set(run(Overlap(), 3000, lambda count: 1.0 / count, waited=0.05)) == {1}


def test_one_row_cannot_be_cut() -> None:
    assert set(run(Overlap(), 1000, lambda count: 1.0 / count, rows=1)) == {1}


def test_it_comes_back_when_the_gain_is_gone() -> None:
    overlap = Overlap()
    run(overlap, 200, lambda count: 1.0 if count == 2 else 2.0)
    assert run(overlap, 4000, float)[-1] == 1


def test_trials_grow_rare_when_they_change_nothing() -> None:
    chosen = run(Overlap(), 20_000, float)
    assert 0 < chosen[-5000:].count(2) <= TRIAL_STEPS // 2 * (5000 // LAST_PAUSE + 1)
    assert chosen[:FIRST_PAUSE].count(1) == FIRST_PAUSE


def test_sizes_and_phases_decide_apart() -> None:
    overlap = Overlap()
    for _ in range(600):
        for phase, rows, best in ((0, 4, 1), (0, 40, 2), (1, 40, 1)):
            count = overlap.choose(phase, rows)
            overlap.observe(phase, rows, count, 1.0 if count == best else 1.5, 0.5)
    assert [overlap.choose(phase, rows) for phase, rows in ((0, 4), (0, 40), (1, 40))] == [1, 2, 1]
