"""Tokens keep their names and places even where they are parts of characters or have no text."""

from pathlib import Path

from braid.cluster.http_logprobs import Offsets, TokenNames, chat_logprobs, completion_logprobs
from braid.cluster.request import TokenLogprob
from braid.model.tokenizer import Tokenizer


def byte_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    by_bytes = {tokenizer.token_bytes(token): token for token in range(256)}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def test_names(tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = TokenNames(tokenizer, as_ids=False)
    first, second = byte_tokens(tokenizer, "é")
    assert (name(first), name(second)) == ("bytes:\\xc3", "bytes:\\xa9")
    assert name(tokenizer.bos_id or 0) == "<bos>"
    assert name(10_000) == "token_id:10000"
    assert TokenNames(tokenizer, as_ids=True)(first) == f"token_id:{first}"
    assert name.bytes_of(first) == [0xC3]


def test_all_bytes_of_a_character_begin_where_it_does(tokenizer: Tokenizer) -> None:
    offsets = Offsets(tokenizer.decoder(), start=10)
    assert [offsets.push(token) for token in byte_tokens(tokenizer, "aéb😀c")] == [10, 11, 11, 12, 13, 13, 13, 13, 14]


def test_the_sampled_token_is_always_among_the_likeliest_shown(tokenizer: Tokenizer) -> None:
    name = TokenNames(tokenizer, as_ids=False)
    a, b, c = byte_tokens(tokenizer, "abc")
    tokens = [TokenLogprob(a, None), TokenLogprob(c, -3.0, ((a, -0.5), (b, -1.0))), TokenLogprob(a, -0.5, ((a, -0.5),))]
    assert completion_logprobs(tokens, [0, 1, 2], 2, name) == {
        "tokens": ["a", "c", "a"],
        "token_logprobs": [None, -3.0, -0.5],
        "top_logprobs": [None, {"a": -0.5, "b": -1.0, "c": -3.0}, {"a": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_an_impossible_token_is_sent_as_a_number(tokenizer: Tokenizer) -> None:
    name = TokenNames(tokenizer, as_ids=False)
    (a,) = byte_tokens(tokenizer, "a")
    (entry,) = chat_logprobs([TokenLogprob(a, float("-inf"), ((a, float("-inf")),))], 1, name)["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0
