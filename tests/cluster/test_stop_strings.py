from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from braid.cluster.stop_strings import StopScanner


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads character by character: nothing is clever here."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            longest = max(completed, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def scan(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    scanner, out = StopScanner(tuple(stops)), ""
    for piece in pieces:
        text, stop = scanner.push(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + scanner.flush(), None


few_letters = st.text("ab\n", max_size=24)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(few_letters, st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4), st.lists(st.integers(0, 24)))
def test_any_split_gives_what_reading_by_character_gives(text: str, stops: list[str], cuts: list[int]) -> None:
    assert scan(cut(text, cuts), stops) == reference(text, stops)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(few_letters, st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
def test_nothing_that_may_become_a_stop_string_leaves_and_nothing_else_is_held(text: str, stops: list[str]) -> None:
    scanner, out = StopScanner(tuple(stops)), ""
    for character in text:
        piece, stop = scanner.push(character)
        out += piece
        if stop is not None:
            return
        read = out + scanner.held
        may_become = [n for n in range(len(read) + 1) if any(s != read[n:] and s.startswith(read[n:]) for s in stops)]
        assert scanner.held == (read[min(may_become) :] if may_become else "")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["ab", "c"], "ab"),  # completed unarmed: text, and not found again afterwards
        (["a", "b"], "ab"),
    ],
)
def test_completed_before_min_tokens_is_text(pieces: list[str], expected: str) -> None:
    scanner = StopScanner(("ab",))
    out = scanner.push(pieces[0], armed=False)[0] + scanner.push(pieces[1], armed=False)[0]
    assert (out + scanner.flush()).startswith(expected)
    assert scanner.push("b") == ("b", None)
    assert scanner.push("xab") == ("x", "ab")


def test_begun_unarmed_and_completed_armed_stops() -> None:
    scanner = StopScanner(("ab",))
    assert scanner.push("xa", armed=False) == ("x", None)
    assert scanner.push("bc") == ("", "ab")
