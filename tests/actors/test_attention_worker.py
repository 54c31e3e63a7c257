"""What an attention worker decides without its network: whom it dials."""

from __future__ import annotations

import pytest

from braid.actors.attention_worker import dial_targets
from braid.actors.view import ClusterView, Role, WorkerInfo
from braid.router.expert_map import ExpertMap

ROLES: dict[str, Role] = {"a": "both", "b": "both", "d": "decode", "e": "expert", "p": "prefill", "q": "prefill"}


def view(has_map: bool) -> ClusterView:
    infos = tuple(WorkerInfo(name, role, 1, "host", "", "", 0, 0, "node") for name, role in ROLES.items())
    return ClusterView(1, infos, ExpertMap(1, 0, (), {}) if has_map else None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", {"b", "d", "e"}), ("b", {"d", "e"}), ("d", {"e"}), ("p", {"a", "b", "d", "e"}), ("q", {"a", "b", "d", "e"})],
)
def test_of_two_workers_that_must_talk_exactly_one_dials(name: str, expected: set[str]) -> None:
    assert {worker.name for worker in dial_targets(name, ROLES[name], view(has_map=True))} == expected
    assert {worker.name for worker in dial_targets(name, ROLES[name], view(has_map=False))} == expected - {"e"}
