"""Log-probabilities in OpenAI's two shapes: parallel lists for completions, one object a token for chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..model.tokenizer import IncrementalDecoder, Tokenizer
from .request import TokenLogprob

_FLOOR = -9999.0  # what OpenAI sends for "never": JSON has no infinity


class TokenNames:
    """How tokens are called in answers."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        """The token's text; "bytes:\\xf0\\x9f" where it is a part of a character; "token_id:7" where it has no text."""
        raw = b"" if self._as_ids else self._tokenizer.token_bytes(token_id)
        if not raw:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes_of(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))


class Offsets:
    """Where in the text each token begins; the bytes of one character all begin where it does."""

    def __init__(self, decoder: IncrementalDecoder, start: int = 0) -> None:
        self._decoder = decoder
        self._place = start

    def push(self, token_id: int) -> int:
        begins = self._place
        self._place += len(self._decoder.push(token_id))
        return begins


def completion_logprobs(
    tokens: Sequence[TokenLogprob], offsets: Sequence[int], num_top: int, name: TokenNames
) -> dict[str, list[Any]]:
    return {
        "tokens": [name(token.token_id) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_top_by_name(token, num_top, name) for token in tokens],
        "text_offset": list(offsets),
    }


def chat_logprobs(tokens: Sequence[TokenLogprob], num_top: int, name: TokenNames) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": name(token_id), "logprob": _finite(logprob), "bytes": name.bytes_of(token_id)}

    content = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top[:num_top]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _top_by_name(token: TokenLogprob, num_top: int, name: TokenNames) -> dict[str, float | None] | None:
    """The likeliest tokens and the one at hand, which may be a further one. None where a prompt begins."""
    if token.logprob is None:
        return None
    named: dict[str, float | None] = {}
    for token_id, logprob in [*token.top[:num_top], (token.token_id, token.logprob)]:
        named.setdefault(name(token_id), _finite(logprob))  # two tokens of one text: the likelier stays
    return named


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None else max(logprob, _FLOOR)
