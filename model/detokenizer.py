"""Turns token ids into text one by one: the pieces put together are the whole decode, and none is half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
# the byte-level alphabet of GPT-2: visible bytes stand for themselves, the others for U+0100 and up
BYTE_OF_CHAR = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}


def byte_level_bytes(piece: str) -> bytes:
    """The bytes a byte-level vocabulary entry stands for; an added token outside the alphabet stands for itself."""
    if all(char in BYTE_OF_CHAR for char in piece):
        return bytes(BYTE_OF_CHAR[char] for char in piece)
    return piece.encode()


class IncrementalDecoder(Protocol):
    def push(self, token_id: int) -> str:
        """The text this token completes; may be empty."""

    def flush(self) -> str:
        """What was still held back. The decoder starts anew afterwards."""


class ByteDecoder:
    """For byte-level vocabularies: every token is a run of bytes, so a streaming UTF-8 decoder is exact."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class WindowDecoder:
    """For other vocabularies, where a token's text may hang on the one before it: decodes a short window of tokens.

    ids:  ... [start ...... done ...... end]     text out = decode(start..end) less its beginning decode(start..done)
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._done = 0  # tokens of the window whose text has left
        self._sent = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._done < 4:  # a character has at most 4 bytes
            return ""
        out = text[len(self._sent) :]
        if not out:  # a token without text gives no context
            del self._window[self._done :]
            return ""
        del self._window[: self._done]  # the newest tokens are context enough for the next ones
        self._done, self._sent = len(self._window), self._decode(self._window)
        return out

    def flush(self) -> str:
        rest = self._decode(self._window)[len(self._sent) :]
        self._window, self._done, self._sent = [], 0, ""
        return rest
