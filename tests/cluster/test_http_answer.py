"""Chunks that are put together from a template are those that JSON would make of the whole."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from braid.cluster.http_answer import Exchange, PlainChunks
from braid.cluster.http_shapes import ChatShape, CompletionShape, Prompt, Shape, Wishes
from braid.cluster.request import Delta, TokenLogprob
from braid.cluster.sse import dump
from braid.model.tokenizer import Tokenizer


def exchange_of(kind: str, tokenizer: Tokenizer, wishes: Wishes) -> Exchange:
    prompt = Prompt("hello", (104,), 0)
    shape: Shape
    if kind == "chat":
        shape = ChatShape(tokenizer, prompt, 2, wishes)
    else:
        shape = CompletionShape(tokenizer, [prompt], 2, wishes)
    return Exchange("cmpl-1", 17, 'a "model"\u2028', (), 2, shape)


@pytest.mark.parametrize("more", [{}, {"usage": None}])
@pytest.mark.parametrize("kind", ["chat", "completion"])
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(min_size=1), index=st.integers(0, 1))
def test_a_plain_chunk_is_the_one_that_the_shape_describes(
    byte_tokenizer: Tokenizer, kind: str, more: dict[str, None], text: str, index: int
) -> None:
    exchange = exchange_of(kind, byte_tokenizer, Wishes(None))
    shape, plain = exchange.shape, PlainChunks(exchange, more)
    delta = Delta(text, (65,))
    assert not shape.is_plain(index, delta), "the first one may say more"
    shape.pieces(index, delta)
    assert shape.is_plain(index, delta)
    whole = dump(exchange.envelope(shape.chunk_name, shape.pieces(index, delta), more))
    assert plain.encode(index, text) == whole
    assert plain.encode(index, text) == whole


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_what_says_more_than_text_is_not_plain(byte_tokenizer: Tokenizer, kind: str) -> None:
    logprobs = (TokenLogprob(65, -1.0),)
    for wishes, delta in [
        (Wishes(None), Delta("a", (65,), finish_reason="stop")),
        (Wishes(0), Delta("a", (65,), logprobs)),
        (Wishes(None, token_ids=True), Delta("a", (65,))),
    ]:
        shape = exchange_of(kind, byte_tokenizer, wishes).shape
        shape.pieces(0, Delta("a", (65,), logprobs))
        assert not shape.is_plain(0, delta)
