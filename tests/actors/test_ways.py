"""Which way rows go."""

from __future__ import annotations

import pytest

from braid.actors.ways import MAX_MAIL_PEERS, way
from braid.router.expert_map import Owner, assign, build_map

NAMES = [f"expert-{index}" for index in range(4)]


def mapped(names: list[str], replicas: int, num_experts: int = 8):  # type: ignore[no-untyped-def]
    owners = [Owner(name, 1) for name in names]
    return build_map(1, num_experts, [1, 2], owners, assign(num_experts, names, replicas))


@pytest.mark.parametrize(
    ("replicas", "has_mail", "expected"),
    [
        (1, [True] * 4, "mail"),
        (1, [True, True, True, False], "staged"),
        (2, [True, True, True, False], "mail"),  # those of the one that is missing are with its neighbour too
        (2, [True, False, False, True], "staged"),
        (4, [False, False, True, False], "mail"),
        (4, [False] * 4, "staged"),
    ],
)
def test_rows_go_by_mail_where_every_expert_has_an_owner_with_a_mailbox(
    replicas: int, has_mail: list[bool], expected: str
) -> None:
    assert way(mapped(NAMES, replicas), has_mail) == expected


def test_more_owners_than_the_peer_table_has_room_for_are_reached_over_links() -> None:
    names = [f"expert-{index}" for index in range(MAX_MAIL_PEERS + 1)]
    assert way(mapped(names, 1), [True] * len(names)) == "staged"
    assert way(mapped(names[:-1], 1), [True] * MAX_MAIL_PEERS) == "mail"


@pytest.mark.parametrize(
    ("has_pair", "expected"),
    [
        ([True] * 4, "paired"),
        ([True, False, True, True], "paired"),
        ([True, False, False, True], "staged"),
        ([], "staged"),
    ],
)
def test_else_through_pairs_where_they_lead_to_every_expert(has_pair: list[bool], expected: str) -> None:
    some_mail = [True, True, False, False]
    assert way(mapped(NAMES, 2), some_mail, has_pair) == expected
    assert way(mapped(NAMES, 2), [True] * 4, has_pair) == "mail"
