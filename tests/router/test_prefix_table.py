from __future__ import annotations

from braid.router.prefix_keys import prefix_keys
from braid.router.prefix_table import PrefixTable

BLOCK = 4


def keys(*tokens: int) -> list[bytes]:
    return prefix_keys(tokens, BLOCK)


def test_counts_the_leading_blocks_that_were_sent_there() -> None:
    table = PrefixTable()
    table.note("w", keys(*range(12)), 100)
    assert table.hits("w", keys(*range(12))) == 3
    assert table.hits("w", keys(*range(9))) == 2
    assert table.hits("w", keys(*range(8), 99, 99, 99, 99)) == 2
    assert table.hits("w", keys(99, *range(1, 12))) == 0
    assert table.hits("other", keys(*range(12))) == 0


def test_forgets_the_ends_of_what_was_used_longest_ago() -> None:
    table = PrefixTable()
    old, new = keys(*range(12)), keys(*range(50, 62))
    table.note("w", old, 5)
    table.note("w", new, 5)
    assert (table.hits("w", old), table.hits("w", new)) == (2, 3)
    table.note("w", old[:2], 5)  # used again: now the others are older
    table.note("w", keys(*range(80, 88)), 5)
    assert table.hits("w", old) == 2
    assert table.hits("w", new) == 1


def test_a_worker_that_is_gone_holds_nothing() -> None:
    table = PrefixTable()
    table.note("w", keys(*range(12)), 100)
    table.forget("w")
    table.forget("w")
    assert table.hits("w", keys(*range(12))) == 0
