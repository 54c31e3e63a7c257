"""Arithmetic over token times, held against counts made by hand."""

import pytest

from braid.benchmarks.figures import (
    agreement,
    best_of,
    decode_tokens_per_s,
    end_to_end_tokens_per_s,
    prefill_tokens_per_s,
    summary,
    time_to_first_token_s,
    tpot_ms,
)

STATIC = [[1.0, 1.5, 2.0, 2.5], [1.0, 1.5, 2.0, 2.5]]
STAGGERED = [[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0, 7.0]]


def test_a_static_batch_decodes_between_its_first_and_last_step() -> None:
    assert decode_tokens_per_s(STATIC) == pytest.approx(4.0)  # two answers, a token each every half second
    assert time_to_first_token_s(STATIC) == 1.0
    assert tpot_ms(STATIC) == pytest.approx(500.0)
    assert end_to_end_tokens_per_s(STATIC) == pytest.approx(8 / 2.5)
    assert prefill_tokens_per_s(STATIC, 256) == pytest.approx(256.0)


def test_decode_counts_only_while_every_answer_is_under_way() -> None:
    assert decode_tokens_per_s(STAGGERED) == pytest.approx(2.0)  # from 3 to 5 s: two tokens of each


def test_decode_speed_does_not_depend_on_how_long_the_prompts_took() -> None:
    later = [[t + 40.0 for t in each] for each in STAGGERED]
    assert decode_tokens_per_s(later) == pytest.approx(decode_tokens_per_s(STAGGERED))


def test_answers_that_never_ran_together_are_taken_whole() -> None:
    assert decode_tokens_per_s([[1.0, 2.0], [5.0, 6.0]]) == pytest.approx(3 / 5)


def test_a_single_token_has_no_time_per_token_but_divides_by_nothing() -> None:
    assert tpot_ms([[1.0]]) == 0.0


def test_summary_is_median_and_spread() -> None:
    told = summary([3.0, 1.0, 10.0])
    assert (told.median, told.least, told.most, told.rounds) == (3.0, 1.0, 10.0, 3)
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_best_is_largest_or_smallest_and_the_first_of_equals() -> None:
    assert best_of({"a": 1.0, "b": 2.0, "c": 2.0}) == "b"
    assert best_of({"a": 1.0, "b": 2.0, "c": 1.0}, is_smaller_better=True) == "a"


def test_agreement_counts_equal_first_tokens() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 9], [5, 4]]) == 0.5
    with pytest.raises(ValueError, match="same job"):
        agreement([[1]], [[1], [2]])
