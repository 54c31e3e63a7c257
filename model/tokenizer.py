"""Text to token ids and back, as the checkpoint's tokenizer.json and tokenizer_config.json say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from .chat_template import ChatTemplate, find_template
from .detokenizer import ByteDecoder, IncrementalDecoder, WindowDecoder, byte_level_bytes

__all__ = ["IncrementalDecoder", "Tokenizer"]


class Tokenizer:
    def __init__(self, path: str | Path) -> None:
        """path: a checkpoint directory. The chat template is compiled here, so that a bad one shows at start.

        Without tokenizer.json the model takes token ids and gives token ids: no token has text.
        """
        directory = Path(path)
        self.has_text = (directory / "tokenizer.json").is_file()
        self._inner = _load(directory / "tokenizer.json") if self.has_text else tokenizers.Tokenizer(models.BPE())
        config = _read_config(directory / "tokenizer_config.json")
        self._is_byte_level = isinstance(self._inner.decoder, decoders.ByteLevel)
        self._special_tokens = _special_tokens(config)
        self.bos_token = self._special_tokens.get("bos_token")
        self.eos_token = self._special_tokens.get("eos_token")
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self._special_ids = frozenset(
            token_id for token_id, token in self._inner.get_added_tokens_decoder().items() if token.special
        )
        self._bytes: dict[int, bytes] = {}
        self._add_bos: bool | None = config.get("add_bos_token")
        self._add_eos: bool | None = config.get("add_eos_token")
        source = find_template(directory, config)
        self._chat = ChatTemplate(source, self._special_tokens) if source is not None else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's own vocab_size may be padded beyond it."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Rendered chat text already holds its special tokens: encode it with `add_special_tokens=False`."""
        if not self.has_text:
            raise ValueError("the model has no tokenizer: send token ids, or add tokenizer.json to the checkpoint")
        says_nothing = self._add_bos is None and self._add_eos is None
        try:
            ids = self._inner.encode(text, add_special_tokens=add_special_tokens and says_nothing).ids
        except (
            TypeError,
            UnicodeError,
        ) as error:  # tokenizers takes the lone surrogates that JSON allows as a wrong type
            raise ValueError("text holds a lone surrogate, which is no character: send valid UTF-8") from error
        if add_special_tokens and self._add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special_tokens and self._add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return list(ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids beyond the vocabulary (a padded head can produce them) are no text."""
        return self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one sequence."""
        if not self._is_byte_level:
            return WindowDecoder(lambda ids: self.decode(ids, skip_special_tokens))
        if not skip_special_tokens:
            return ByteDecoder(self.token_bytes)
        return ByteDecoder(lambda token_id: b"" if token_id in self._special_ids else self.token_bytes(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special tokens included; may be part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return b""
        return byte_level_bytes(piece) if self._is_byte_level else piece.replace("\u2581", " ").encode()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        if self._chat is None:
            raise ValueError("the model has no chat template: send text, or add chat_template.jinja to the checkpoint")
        return self._chat.render(messages, add_generation_prompt, variables)

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._inner.token_to_id(token)


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    return inner


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}: it must hold an object")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, pad_token, ...: each a string or an object with its `content`."""
    found: dict[str, str] = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found
