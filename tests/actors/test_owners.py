"""Who is asked for which expert while owners come to life, die, lack an expert and take turns."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from braid.actors.links import Hello, Link
from braid.actors.owners import Owners, nobody
from braid.actors.socket_pipe import SocketPipe
from braid.router.expert_map import ExpertMap, Owner, assign, build_map

NAMES, NUM_EXPERTS, LAYERS = ["a", "b", "c"], 6, [2, 5]


@pytest.fixture
def links() -> Iterator[dict[str, Link]]:
    """One to the first life of each."""
    pairs = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for name in NAMES}
    made = {name: Link(Hello(name, "expert", 1, "host"), SocketPipe(ours, "unix")) for name, (ours, _) in pairs.items()}
    yield made
    for name, (_, theirs) in pairs.items():
        made[name].close()
        theirs.close()


def map_of(*incarnations: int) -> ExpertMap:
    """Every expert is on all three."""
    owners = [Owner(name, life) for name, life in zip(NAMES, incarnations, strict=True)]
    return build_map(7, NUM_EXPERTS, LAYERS, owners, assign(NUM_EXPERTS, NAMES, 3))


def test_only_living_owners_of_the_right_life_are_asked(links: dict[str, Link]) -> None:
    links["c"].close()
    owners = Owners(map_of(1, 2, 1), links)
    assert owners.links == [links["a"], None, links["c"]]
    assert owners.table.shape == (2, NUM_EXPERTS)
    assert set(owners.table.flat) == {0}
    owners.leave_out(0)
    assert set(owners.table.flat) == {-1}


def test_an_expert_that_an_owner_lacks_is_asked_of_another_in_that_layer_only(links: dict[str, Link]) -> None:
    owners = Owners(map_of(1, 1, 1), links)
    before = owners.table.copy()
    row, expert = owners.row_of_layer[5], 3
    owners.forget(5, np.array([expert]), int(before[row, expert]))
    assert owners.table[row, expert] not in (-1, before[row, expert])
    owners.table[row, expert] = before[row, expert]
    assert np.array_equal(owners.table, before)


def test_a_new_choice_takes_in_who_was_left_out(links: dict[str, Link]) -> None:
    owners = Owners(map_of(1, 1, 1), links)
    first = owners.table.copy()
    owners.leave_out(1)
    assert 1 not in owners.table
    owners.choose([True, True, True])
    assert np.array_equal(owners.table, first)


def test_whoever_serves_most_is_asked_less(links: dict[str, Link]) -> None:
    owners = Owners(map_of(1, 1, 1), links)
    before = np.bincount(owners.table.ravel(), minlength=3)
    busiest = int(before.argmax())
    for _ in range(200):
        owners.served[busiest] += 10
        owners.balance()
        assert not owners.served.any()
    assert np.bincount(owners.table.ravel(), minlength=3)[busiest] < before[busiest]


def test_before_the_first_map_there_is_nobody() -> None:
    owners = nobody(NUM_EXPERTS)
    owners.balance()
    assert (len(owners), owners.links, owners.row_of_layer) == (0, [], {})
