"""The replica bias evens out load between replicas and never names a worker without the expert."""

import numpy as np
import pytest

from braid.router.expert_map import Owner, assign, build_map
from braid.router.replica_bias import ReplicaBias

LAYERS = list(range(1, 9))


def bias_over(workers: int, replicas: int, experts: int = 16) -> ReplicaBias:
    names = [f"expert-{i}" for i in range(workers)]
    held = assign(experts, names, replicas)
    return ReplicaBias(build_map(1, experts, LAYERS, [Owner(n, 1) for n in names], held), LAYERS)


def rows_per_owner(bias: ReplicaBias, popularity: np.ndarray, owners: int) -> np.ndarray:
    """Rows each owner gets when expert e is asked for popularity[e] times in every layer."""
    weights = np.broadcast_to(popularity, bias.table().shape)
    return np.bincount(bias.table().ravel(), weights=weights.ravel(), minlength=owners).astype(float)


def test_the_table_names_only_owners_that_hold_the_expert() -> None:
    names = [f"expert-{i}" for i in range(5)]
    held = assign(16, names, 2)
    expert_map = build_map(1, 16, LAYERS, [Owner(n, 1) for n in names], held)
    table = ReplicaBias(expert_map, LAYERS).table()
    for row, layer in enumerate(LAYERS):
        for expert in range(16):
            assert table[row, expert] in expert_map.replicas[layer][expert]


def test_even_popularity_is_served_evenly() -> None:
    bias = bias_over(2, 2)
    for _ in range(100):
        bias.update(rows_per_owner(bias, np.ones(16), 2))
    rows = rows_per_owner(bias, np.ones(16), 2)
    assert rows.max() / rows.mean() < 1.15


@pytest.mark.parametrize("workers", [2, 4])
def test_a_hot_expert_moves_other_experts_away_from_its_worker(workers: int) -> None:
    bias = bias_over(workers, 2)
    popularity = np.ones(16)
    popularity[3] = 12.0
    before = rows_per_owner(bias, popularity, workers)
    for _ in range(200):
        bias.update(rows_per_owner(bias, popularity, workers))
    after = rows_per_owner(bias, popularity, workers)
    assert after.max() / after.mean() < before.max() / before.mean()
    assert after.max() / after.mean() < 1.35


def test_an_owner_that_turned_out_not_to_hold_an_expert_is_not_asked_for_it_again() -> None:
    bias = bias_over(2, 2)
    bias.forget(3, np.array([5, 6]), 0)
    assert (bias.table()[3, [5, 6]] == 1).all()
    assert (bias.table() == 0).any()


def test_a_dead_owner_gets_nothing_and_orphans_are_marked() -> None:
    bias = bias_over(2, 2)
    bias.drop(0)
    assert (bias.table() == 1).all()
    bias.drop(1)
    assert (bias.table() == -1).all()
