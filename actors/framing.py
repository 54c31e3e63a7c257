"""Cuts a byte stream into messages: a fixed header (magic, version, kind, lengths), then meta, then payload.

A received payload has a buffer of its own, filled straight from the pipe, and starts on a 64-byte boundary: the bits a
matrix product gives may depend on the alignment of its operands, and torch's own tensors are aligned so.
"""

import struct
from collections.abc import Sequence
from ctypes import addressof, c_char

import numpy as np

from .pipe import PeerGone, Piece, Pipe

MAGIC = b"Br"
VERSION = 1
HEADER = struct.Struct("<2sBxHIQ")  # magic, version, kind, meta_len, payload_len
MAX_FRAME_BYTES = 1 << 30
ALIGNMENT = 64


def frame_pieces(kind: int, meta: bytes, payload: Sequence[Piece]) -> tuple[list[Piece], int]:
    """The pieces of one frame in order, and their bytes in all."""
    pieces: list[Piece] = [b""]
    payload_len = 0
    for part in payload:
        piece = part if type(part) is bytes else _flat(part)
        if piece:
            pieces.append(piece)
            payload_len += len(piece)
    num_bytes = HEADER.size + len(meta) + payload_len
    if num_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {num_bytes} bytes exceeds {MAX_FRAME_BYTES}: send it as several messages")
    try:
        pieces[0] = HEADER.pack(MAGIC, VERSION, kind, len(meta), payload_len) + meta
    except struct.error as error:
        raise ValueError(f"message kind {kind!r} must be a number from 0 to 65535") from error
    return pieces, num_bytes


def _flat(part: Piece) -> memoryview:
    view = memoryview(part)
    if view.ndim == 1 and view.format == "B" and view.contiguous:
        return view
    if not view.c_contiguous:
        raise ValueError("a payload must be contiguous: copy it first, as tensor.contiguous() does")
    return view.cast("B") if view.nbytes else memoryview(b"")


class FrameReader:
    """Keeps the half-read frame of one link between two turns."""

    def __init__(self) -> None:
        self._header = memoryview(bytearray(HEADER.size))
        self._target = self._header
        self._filled = 0
        self._kind = self._meta_len = self._payload_len = 0

    def read(self, pipe: Pipe) -> tuple[int, bytes, memoryview] | None:
        """(kind, meta, payload) once a frame is whole, else None. Raises PeerGone."""
        if not self._filled and self._target is self._header:
            buffer, start, end = pipe.window()
            if end - start < HEADER.size:
                if start == end:
                    return None
            else:
                self._parse(buffer, start)
                start += HEADER.size
                body = _aligned_body(self._meta_len, self._payload_len)
                if end - start >= len(body):  # nearly always: the whole frame is here
                    body[:] = buffer[start : start + len(body)]
                    pipe.consume(HEADER.size + len(body))
                    return self._kind, bytes(body[: self._meta_len]), body[self._meta_len :]
                pipe.consume(HEADER.size)
                self._target = body
        return self._read_on(pipe)

    def is_mid_frame(self) -> bool:
        return self._filled > 0 or self._target is not self._header

    def _read_on(self, pipe: Pipe) -> tuple[int, bytes, memoryview] | None:
        """Goes on with a frame that arrives in parts."""
        if self._target is self._header:
            if not self._fill(pipe):
                return None
            self._filled = 0
            self._parse(self._header, 0)
            self._target = _aligned_body(self._meta_len, self._payload_len)
        if not self._fill(pipe):
            return None
        body, meta_len = self._target, self._meta_len
        self._target, self._filled = self._header, 0
        return self._kind, bytes(body[:meta_len]), body[meta_len:]

    def _fill(self, pipe: Pipe) -> bool:
        target = self._target
        while self._filled < len(target):
            num_bytes = pipe.read_into(target[self._filled :])
            if not num_bytes:
                return False
            self._filled += num_bytes
        return True

    def _parse(self, buffer: memoryview, start: int) -> None:
        magic, version, self._kind, self._meta_len, self._payload_len = HEADER.unpack_from(buffer, start)
        if magic != MAGIC or version != VERSION:
            raise PeerGone(f"not a frame of version {VERSION}: it begins with {bytes(buffer[start : start + 3]).hex()}")
        if self._meta_len + self._payload_len > MAX_FRAME_BYTES:
            raise PeerGone(f"a frame of {self._meta_len + self._payload_len} bytes exceeds {MAX_FRAME_BYTES}")


def _aligned_body(meta_len: int, payload_len: int) -> memoryview:
    """One buffer for meta and payload, whose payload is aligned."""
    buffer = np.empty(meta_len + payload_len + ALIGNMENT, np.uint8).data  # not cleared, as a bytearray would be
    start = -(addressof(c_char.from_buffer(buffer)) + meta_len) % ALIGNMENT
    return buffer[start : start + meta_len + payload_len]
