from __future__ import annotations

from braid.cluster.callers import caller_of


def test_holders_of_several_keys_are_told_apart_by_their_keys_alone() -> None:
    keys = {"one", "schlüssel"}
    first, second = caller_of("Bearer one", keys, "x"), caller_of("bearer  schlüssel", keys, "x")
    assert first != second
    assert first == caller_of("bearer one ", keys, "somebody else")  # users can be invented
    assert "one" not in first


def test_sharers_of_a_key_are_told_apart_by_their_users() -> None:
    for keys in (set(), {"one"}):
        assert caller_of("Bearer one", keys, "anna") == "anna"
        assert caller_of("", keys, "") == ""
        assert len(caller_of("", keys, "x" * 100_000)) == 64
