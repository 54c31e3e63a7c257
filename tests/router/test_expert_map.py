"""The expert map is checked before it is published, and assignment never puts two copies on one worker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.router.expert_map import ExpertMap, Owner, assign, build_map


def two_workers(epoch: int = 1) -> ExpertMap:
    held = assign(4, ["expert-0", "expert-1"], replicas=2)
    return build_map(epoch, 4, [1, 2], [Owner("expert-0", 1), Owner("expert-1", 1)], held)


@given(st.integers(1, 64), st.integers(1, 9), st.integers(1, 5))
def test_every_expert_has_its_copies_on_different_workers(experts: int, workers: int, replicas: int) -> None:
    names = [f"expert-{i}" for i in range(workers)]
    held = assign(experts, names, replicas)
    for expert in range(experts):
        assert sum(expert in mine for mine in held.values()) == min(replicas, workers)
    sizes = [len(mine) for mine in held.values()]
    assert max(sizes) - min(sizes) <= min(replicas, workers)


def test_without_workers_there_is_nothing_to_assign_to() -> None:
    with pytest.raises(ValueError, match=r"experts\.workers"):
        assign(4, [], 1)


def test_a_lost_worker_leaves_a_map_that_still_checks_when_replicas_remain() -> None:
    left = two_workers().without("expert-0", epoch=2)
    left.check()
    assert left.epoch == 2
    assert left.owners == (Owner("expert-1", 1),)
    assert left.replica_counts(1) == [1, 1, 1, 1]


def test_a_map_with_an_orphan_is_refused_by_name() -> None:
    orphaned = two_workers().without("expert-0", 2).without("expert-1", 3)
    with pytest.raises(ValueError, match="layer 1 expert 0: no resident owner in map epoch 3"):
        orphaned.check()


def test_a_map_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="lists 1 experts, the model has 2"):
        ExpertMap(1, 2, (Owner("a", 1),), {0: ((0,),)}).check()
