"""The depth of drafts under virtual time: it settles where the product of acceptance and cost says it should."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from braid.actors.speculation import FIRST_PROBE, LAST_PROBE, MAX_DEPTH, PROBE_STEPS, Acceptance, Costs, Speculation

Seconds = Callable[[int], float]


class World:
    """A worker whose passes take what the test says and whose drafts come true as often as it says."""

    def __init__(self, verify: Seconds, draft: Seconds, shares: tuple[float, float]) -> None:
        self.verify, self.draft, self.shares = verify, draft, shares
        self.policy = Speculation()
        self.own: list[Acceptance] = []
        self.dice = random.Random(0)
        self.clock = 0.0
        self.tokens = 0

    def accepted(self, depth: int) -> int:
        misses = (place for place in range(depth) if self.dice.random() >= self.shares[place])
        return next(misses, depth)

    def run(self, num_sequences: int, steps: int) -> Counter[int]:
        """Returns how many steps drafted how deep."""
        policy, depths = self.policy, Counter[int]()
        self.own = [policy.new_sequence() for _ in range(num_sequences)]
        drafted = [0] * num_sequences
        for _ in range(steps):
            took = self.verify(num_sequences + sum(drafted))
            policy.step_costs.observe(num_sequences + sum(drafted), took)
            self.clock += took
            rows = []
            for own, depth in zip(self.own, drafted, strict=True):
                accepted = self.accepted(depth)
                policy.verified(own, depth, accepted)
                rows.append(1 + accepted)
            self.tokens += sum(rows)
            policy.start(num_sequences)
            drafted = [policy.depth(own) for own in self.own]
            depths[max(drafted)] += 1
            for place in range(max(drafted)):
                count = sum(1 if place else row for row, depth in zip(rows, drafted, strict=True) if depth > place)
                took = self.draft(count)
                policy.draft_costs.observe(count, took)
                self.clock += took
        return depths

    def rate(self, num_sequences: int, steps: int = 400) -> float:
        clock, tokens = self.clock, self.tokens
        self.run(num_sequences, steps)
        return (self.tokens - tokens) / (self.clock - clock)


def memory_bound(rows: int) -> float:
    return 10.0 + 0.1 * rows


def test_two_drafts_where_rows_are_free_and_drafts_come_true() -> None:
    depths = World(memory_bound, lambda rows: 1.0, (0.9, 0.85)).run(1, 300)
    assert depths[2] >= 290


def test_one_draft_where_the_second_seldom_comes_true() -> None:
    depths = World(memory_bound, lambda rows: 2.0, (0.8, 0.1)).run(1, 1000)
    assert depths[1] >= 900
    assert depths[0] <= 2 + 3 * (PROBE_STEPS + 1)  # three probes of what steps cost without drafts


def test_none_where_rows_cost_what_they_bring() -> None:
    world = World(lambda rows: 1.0 * rows, lambda rows: 0.3 * rows, (0.6, 0.5))
    world.run(32, 500)
    depths = world.run(32, 2000)
    assert 1980 <= depths[0] < 2000, "off, but for a few probes"


@pytest.mark.parametrize("num_sequences", [1, 8])
def test_a_machine_that_others_use_too_does_not_make_drafts_pay(num_sequences: int) -> None:
    """A draft costs a seventh more than it brings; the times of single steps differ by far more than that."""
    dice = random.Random(1)

    def disturbed(seconds: float) -> float:
        return seconds * dice.lognormvariate(0, 0.25) * (3 if dice.random() < 0.05 else 1)

    world = World(
        lambda rows: disturbed(20 + 4 * rows / num_sequences),
        lambda rows: disturbed(11 + 3 * rows / num_sequences),
        (0.6, 0.5),
    )
    world.run(num_sequences, 600)
    assert world.run(num_sequences, 6000)[0] > 5400


def test_none_where_drafts_never_come_true() -> None:
    """A random MTP module costs next to nothing in the end."""
    world = World(memory_bound, lambda rows: 2.0, (0.0, 0.0))
    world.run(1, 1000)
    plain = 1 / memory_bound(1)
    assert world.rate(1, 2000) > 0.99 * plain


@pytest.mark.parametrize("shares", [(0.9, 0.8), (0.6, 0.5), (0.1, 0.1)])
@pytest.mark.parametrize("per_row", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("num_sequences", [1, 8])
def test_never_far_below_the_best_fixed_depth(shares: tuple[float, float], per_row: float, num_sequences: int) -> None:
    world = World(lambda rows: 10.0 + per_row * rows, lambda rows: 2.0 + 0.2 * per_row * rows, shares)
    world.run(num_sequences, 600)
    expected = Acceptance(list(shares))
    fixed = []
    for depth in range(MAX_DEPTH + 1):
        took = world.verify(num_sequences * (1 + depth))
        took += world.draft(round(num_sequences * expected.tokens(depth))) if depth else 0.0
        took += world.draft(num_sequences) if depth == 2 else 0.0
        fixed.append(num_sequences * expected.tokens(depth) / took)
    assert world.rate(num_sequences, 800) > 0.94 * max(fixed)


def test_comes_back_when_the_batch_empties() -> None:
    """At 64 sequences a row costs what it brings; alone, the same rows are free."""
    world = World(lambda rows: max(8.0, 1.0 * rows), lambda rows: 1.0 + 0.1 * rows, (0.85, 0.3))
    world.run(64, 500)
    assert world.run(64, 400)[0] >= 395
    assert world.run(1, 100)[0] <= 10


def test_a_probe_notices_that_drafts_come_true_again() -> None:
    world = World(memory_bound, lambda rows: 2.0, (0.0, 0.0))
    world.run(4, 300)
    world.shares = (0.95, 0.9)
    world.run(4, 3 * LAST_PROBE)
    assert world.run(4, 100)[0] == 0


def test_what_drafts_cost_in_a_bad_hour_is_forgotten_with_the_next_probe() -> None:
    """A process begins with cold weights, or beside others; without drafts it would hear no more of what they cost."""
    world = World(memory_bound, lambda rows: 1.0, (0.9, 0.85))
    world.verify = lambda rows: memory_bound(rows) * (5 if rows > 1 and world.clock < 25 * FIRST_PROBE else 1)
    assert world.run(1, 2 * FIRST_PROBE)[0] > FIRST_PROBE
    world.run(1, 2 * FIRST_PROBE)
    assert world.run(1, 100)[2] >= 95


def test_a_sequence_whose_drafts_fail_does_not_draft_among_others_that_do() -> None:
    policy = Speculation()
    for _ in range(2):
        policy.step_costs.observe(2, 10.0)
        policy.step_costs.observe(6, 12.0)
        policy.draft_costs.observe(2, 3.0)
    good, bad = policy.new_sequence(), policy.new_sequence()
    for _ in range(30):
        policy.verified(good, 2, 2)
        policy.verified(bad, 2, 0)
        policy.verified(good, 2, 2)
    policy.start(2)
    assert policy.depth(good) > 0
    assert policy.depth(bad) == 0


def test_acceptance_of_a_draft_counts_only_where_it_was_reached() -> None:
    acceptance = Acceptance([0.5, 0.5])
    for _ in range(200):
        acceptance.observe(2, 0)
    assert acceptance.shares[0] < 0.01
    assert acceptance.shares[1] == 0.5
    assert acceptance.tokens(0) == 1.0
    acceptance.shares = [0.8, 0.5]
    assert acceptance.tokens(2) == pytest.approx(1 + 0.8 + 0.4)


def test_costs_interpolate_and_forget_a_stall() -> None:
    costs = Costs()
    assert costs.at(7) == 0.0
    for seconds in (50.0, *[1.0] * 20):  # the first pass of a shape is not counted
        costs.observe(2, seconds)
        costs.observe(6, 3 * seconds)
    assert (costs.at(1), costs.at(2), costs.at(4), costs.at(6), costs.at(99)) == (0.5, 1.0, 2.0, 3.0, 3.0)
    costs.observe(6, 500.0)
    assert costs.at(6) < 3.4


def test_a_size_hardly_seen_costs_no_more_than_larger_ones() -> None:
    costs = Costs()
    for rows, seconds in ((1, 1.0), (2, 9.0), (3, 2.0), (5, 4.0)):
        costs.observe(rows, seconds)
        costs.observe(rows, seconds)
    assert [costs.at(rows) for rows in (1, 2, 2.5, 3, 4, 5)] == [1.0, 2.0, 2.0, 2.0, 3.0, 4.0]
    for _ in range(2):
        costs.observe(2, 9.0)
    assert costs.at(2) == 9.0, "often enough to be believed"


def test_costs_keep_few_sizes_apart() -> None:
    costs = Costs()
    for rows in range(1, 4097):
        costs.observe(rows, float(rows))
        costs.observe(rows, float(rows))
    assert len(costs._rows) < 50
    for rows in (1, 3, 10, 100, 1000):
        assert costs.at(rows) == pytest.approx(rows, rel=0.3)


def test_probes_grow_rare() -> None:
    policy = Speculation()
    for _ in range(2):
        policy.step_costs.observe(1, 1.0)
        policy.step_costs.observe(3, 30.0)
        policy.draft_costs.observe(1, 1.0)
    probed = []
    for step in range(6 * LAST_PROBE):
        policy.start(1)
        if policy.depth(policy.acceptance):
            probed.append(step)
    starts = [step for step, before in zip(probed, [-9, *probed], strict=False) if step - before > 1]
    gaps = [after - before for before, after in pairwise(starts)]
    assert starts[0] < 2 * FIRST_PROBE
    assert gaps == sorted(gaps)
    assert gaps[-1] >= LAST_PROBE
