from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.router.prefix_keys import prefix_keys

PROMPT = [(31 * i) % 120_000 for i in range(200)]


@pytest.mark.parametrize(("length", "keys"), [(0, 0), (63, 0), (64, 1), (65, 1), (127, 1), (128, 2), (200, 3)])
def test_only_full_blocks_have_keys(length: int, keys: int) -> None:
    assert prefix_keys(PROMPT[:length], 64) == prefix_keys(PROMPT, 64)[:keys]


@given(st.integers(0, 191), st.integers(0, 2**32 - 1))
def test_a_key_depends_on_every_token_before_its_end_and_on_none_behind(place: int, token: int) -> None:
    changed = [*PROMPT[:place], token, *PROMPT[place + 1 :]]
    same = [one == other for one, other in zip(prefix_keys(PROMPT, 64), prefix_keys(changed, 64), strict=True)]
    assert same == [token == PROMPT[place] or block < place // 64 for block in range(3)]


def test_the_same_tokens_in_another_place_have_another_key() -> None:
    block = PROMPT[:64]
    keys = prefix_keys(block * 3, 64)
    assert len(set(keys)) == 3
