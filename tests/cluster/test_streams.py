from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_worker import write_tokenizer

from braid.actors.messages import TokenItem
from braid.cluster.request import Delta, TokenLogprob, Usage
from braid.cluster.streams import OutputStream
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

PIECES = ("ab", "ba", "a\n", "abb", "\n\n", "é", "→a")
PROMPT = (1, 2, 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), PIECES))


EOS = 256 + len(PIECES)


def run(stream: OutputStream, items: list[TokenItem]) -> list[Delta]:
    return [delta for item in items for delta in stream.push(item.wire())]


def stream_of(tokenizer: Tokenizer, *stops: str, **params: Any) -> OutputStream:
    return OutputStream(PROMPT, SamplingParams(**{"max_tokens": 1000, **params}), stops, tokenizer.decoder())


def reference(text: str, stops: list[str]) -> str:
    """Everything before the first stop string to be completed, reading by character."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - len(max(completed, key=len))]
    return text


token = st.sampled_from([*b"ab\n", *range(256, 256 + len(PIECES)), *"é→".encode()])  # also characters byte by byte
stop_strings = st.lists(st.text("ab\né→", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(token, max_size=14), stop_strings, st.integers(0, 2**32))
def test_any_tokens_in_any_order_of_arrival(
    tokenizer: Tokenizer, token_ids: list[int], stops: list[str], seed: int
) -> None:
    """The text is that of a reference search over the whole, however tokens are grouped and items overtake."""
    rng, items, index = random.Random(seed), [], 0
    while index < len(token_ids):
        group = token_ids[index : index + rng.randint(1, 3)]
        items.append(TokenItem("id", index, group))
        index += len(group)
    items.append(TokenItem("id", index, [EOS], finish="stop"))
    rng.shuffle(items)
    deltas = run(stream_of(tokenizer, *stops), items)
    whole = tokenizer.decode(token_ids)
    assert "".join(delta.text for delta in deltas) == reference(whole, stops)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert (deltas[-1].stop_reason is not None) == (reference(whole, stops) != whole)
    seen = [token_id for delta in deltas for token_id in delta.token_ids]
    assert seen == [*token_ids, EOS][: len(seen)]
    assert deltas[-1].usage == Usage(3, len(seen), 0)


def test_tokens_after_the_one_that_completes_a_stop_string_are_not_counted(tokenizer: Tokenizer) -> None:
    stream = stream_of(tokenizer, "ab")
    (delta,) = run(stream, [TokenItem("id", 0, [*b"xaby"], logprobs=[[-1.0, []]] * 4)])
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("x", tuple(b"xab"), "ab")
    assert delta.logprobs == tuple(TokenLogprob(token_id, -1.0) for token_id in b"xab")
    assert delta.usage == Usage(3, 3)
    assert run(stream, [TokenItem("id", 4, [*b"z"])]) == []


def test_half_characters_wait_for_their_other_half(tokenizer: Tokenizer) -> None:
    items = [TokenItem("id", place, [byte]) for place, byte in enumerate("a→".encode())]
    assert [delta.text for delta in run(stream_of(tokenizer), items)] == ["a", "", "", "→"]


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    (delta,) = run(stream_of(tokenizer), [TokenItem("id", 0, [*b"a\xe2\x86"], finish="length")])
    assert (delta.text, delta.finish_reason) == ("a\ufffd", "length")


def test_text_held_back_leaves_at_the_end(tokenizer: Tokenizer) -> None:
    deltas = run(
        stream_of(tokenizer, "abc"), [TokenItem("id", 0, [*b"xab"]), TokenItem("id", 3, [*b"a"], finish="length")]
    )
    assert [delta.text for delta in deltas] == ["x", "aba"]


def test_min_tokens_come_before_a_stop_string_counts(tokenizer: Tokenizer) -> None:
    stream = stream_of(tokenizer, "ab", min_tokens=3)
    deltas = run(stream, [TokenItem("id", place, [byte]) for place, byte in enumerate(b"abxab")])
    assert "".join(delta.text for delta in deltas) == "abx"
    assert deltas[-1].usage == Usage(3, 5)


def test_drafts_that_came_true_behind_a_stop_string_are_in_no_answer(tokenizer: Tokenizer) -> None:
    deltas = run(stream_of(tokenizer, "b"), [TokenItem("id", 0, [*b"abcdef"], accepted=5, rejected=1)])
    assert deltas[-1].usage == Usage(3, 2, 0, 2, 1)


def test_a_stop_token_is_no_text_and_is_named(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=9, stop_token_ids=(ord("b"),))
    stream = OutputStream(PROMPT, params, (), tokenizer.decoder())
    (delta,) = run(stream, [TokenItem("id", 0, [*b"ab"], finish="stop", cached=2)])
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("a", tuple(b"ab"), ord("b"))
    assert delta.usage == Usage(3, 2, 2)


def test_repeated_items_are_dropped(tokenizer: Tokenizer) -> None:
    item = TokenItem("id", 0, [*b"a"])
    assert [delta.text for delta in run(stream_of(tokenizer), [item, item])] == ["a"]


def test_prompt_logprobs_alone(tokenizer: Tokenizer) -> None:
    stream = stream_of(tokenizer, max_tokens=0, prompt_logprobs=1)
    scored = [None, [-1.0, [[7, -0.5]]], [-2.0, []]]
    (delta,) = run(stream, [TokenItem("id", prompt_logprobs=scored, finish="length")])
    assert delta.prompt_logprobs == (TokenLogprob(1, None), TokenLogprob(2, -1.0, ((7, -0.5),)), TokenLogprob(3, -2.0))
    assert delta.usage == Usage(3, 0)
