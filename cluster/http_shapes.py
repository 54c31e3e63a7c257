"""The two shapes of an answer. Each turns deltas into pieces, which a stream sends and a whole answer adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..model.tokenizer import Tokenizer
from .http_logprobs import Offsets, TokenNames, chat_logprobs, completion_logprobs
from .request import Delta

Piece = dict[str, Any]  # one entry of `choices`


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what echo gives back; `num_hidden` leading tokens (the begin token) are not in it."""

    text: str
    ids: tuple[int, ...]
    num_hidden: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller wants to see of the tokens."""

    num_top: int | None
    echo: bool = False
    token_ids: bool = False
    names_are_ids: bool = False

    @property
    def text_only(self) -> bool:
        return self.num_top is None and not self.token_ids


class Shape(Protocol):
    id_prefix: str
    object_name: str
    chunk_name: str

    def pieces(self, index: int, delta: Delta) -> list[Piece]:
        """What a stream sends for one delta of choice `index`; nothing where nobody would see a difference."""

    def is_plain(self, index: int, delta: Delta) -> bool:
        """Whether `plain_piece` with its text says all that a stream has to say of this delta."""

    def plain_piece(self, index: int, text: str) -> Piece:
        """What `pieces` makes of a delta in the midst of an answer of which only the text is wanted."""

    def whole(self, index: int, pieces: Sequence[Piece]) -> Piece:
        """All pieces of one choice put together."""

    def top_level(self) -> Mapping[str, Any]:
        """Fields beside `choices`, of a whole answer and of a stream's first chunk."""


class CompletionShape:
    id_prefix, object_name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Prompt], n: int, wishes: Wishes) -> None:
        self._wishes = wishes
        self._names = TokenNames(tokenizer, wishes.names_are_ids)
        self._prompts = [prompt for prompt in prompts for _ in range(n)]
        self._prompt_offsets = [Offsets(tokenizer.decoder(skip_special_tokens=False)) for _ in self._prompts]
        self._offsets = [
            Offsets(tokenizer.decoder(), len(prompt.text) if wishes.echo else 0) for prompt in self._prompts
        ]
        self._has_begun = [False] * len(self._prompts)

    def pieces(self, index: int, delta: Delta) -> list[Piece]:
        is_first, self._has_begun[index] = not self._has_begun[index], True
        prompt = self._prompts[index]
        piece: Piece = {
            "index": index,
            "text": (prompt.text if is_first and self._wishes.echo else "") + delta.text,
            "logprobs": self._logprobs(index, delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._wishes.token_ids:
            piece |= {"prompt_token_ids": list(prompt.ids)} if is_first else {}
            piece |= {"token_ids": list(delta.token_ids)}
        is_seen = piece["text"] or delta.finish_reason or self._wishes.token_ids or piece["logprobs"]
        return [piece] if is_seen else []

    def is_plain(self, index: int, delta: Delta) -> bool:
        return self._has_begun[index] and self._wishes.text_only and delta.finish_reason is None

    def plain_piece(self, index: int, text: str) -> Piece:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def whole(self, index: int, pieces: Sequence[Piece]) -> Piece:
        whole = {**pieces[0], **pieces[-1], "text": "".join(piece["text"] for piece in pieces)}
        shown = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        if shown:
            whole["logprobs"] = {key: [entry for part in shown for entry in part[key]] for key in shown[0]}
        if self._wishes.token_ids:
            whole["token_ids"] = [token for piece in pieces for token in piece["token_ids"]]
        return whole

    def top_level(self) -> Mapping[str, Any]:
        return {}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, list[Any]] | None:
        if self._wishes.num_top is None:
            return None
        tokens = list(delta.logprobs or ())
        offsets = [self._offsets[index].push(token.token_id) for token in tokens]
        if self._wishes.echo and delta.prompt_logprobs is not None:
            tokens = [*delta.prompt_logprobs, *tokens]
            offsets = [*self._offsets_of_prompt(index), *offsets]
        return completion_logprobs(tokens, offsets, self._wishes.num_top, self._names) if tokens else None

    def _offsets_of_prompt(self, index: int) -> list[int]:
        prompt, offsets = self._prompts[index], self._prompt_offsets[index]
        return [0] * prompt.num_hidden + [offsets.push(token) for token in prompt.ids[prompt.num_hidden :]]


class ChatShape:
    id_prefix, object_name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, n: int, wishes: Wishes) -> None:
        self._wishes = wishes
        self._names = TokenNames(tokenizer, wishes.names_are_ids)
        self._prompt = prompt
        self._has_begun = [False] * n

    def pieces(self, index: int, delta: Delta) -> list[Piece]:
        opening: list[Piece] = []
        if not self._has_begun[index]:
            self._has_begun[index] = True
            empty = {"role": "assistant", "content": ""}
            opening = [{"index": index, "delta": empty, "logprobs": None, "finish_reason": None}]
        piece: Piece = {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason:
            piece["stop_reason"] = delta.stop_reason
        if self._wishes.token_ids:
            piece["token_ids"] = list(delta.token_ids)
        is_seen = delta.text or delta.finish_reason or self._wishes.token_ids or piece["logprobs"]
        return [*opening, piece] if is_seen else opening

    def is_plain(self, index: int, delta: Delta) -> bool:
        return self._has_begun[index] and self._wishes.text_only and delta.finish_reason is None

    def plain_piece(self, index: int, text: str) -> Piece:
        return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, pieces: Sequence[Piece]) -> Piece:
        text = "".join(piece["delta"].get("content", "") for piece in pieces)
        shown = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        content = [entry for part in shown for entry in part["content"]]
        whole: Piece = {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": {"content": content, "refusal": None} if self._wishes.num_top is not None else None,
            "finish_reason": pieces[-1]["finish_reason"],
            "stop_reason": pieces[-1]["stop_reason"],
        }
        if self._wishes.token_ids:
            whole["token_ids"] = [token for piece in pieces for token in piece.get("token_ids", ())]
        return whole

    def top_level(self) -> Mapping[str, Any]:
        return {"prompt_token_ids": list(self._prompt.ids)} if self._wishes.token_ids else {}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._wishes.num_top is None or not delta.logprobs:
            return None
        return chat_logprobs(delta.logprobs, self._wishes.num_top, self._names)
