"""Cuts a byte stream into messages: a fixed header (magic, version, kind, lengths), then meta, then payload.

A received payload has a buffer of its own, filled straight from the pipe, and starts on a 64-byte boundary: the bits a
matrix product gives may depend on the alignment of its operands, and torch's own tensors are aligned so. Payloads of
one kind may stay in the pipe's memory instead, where it has any: unaligned, and nobody's to write.
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

Frame = tuple[int, bytes, memoryview, object]  # kind, meta, payload, and what keeps the payload's memory


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
    pieces[0] = frame_head(kind, meta, payload_len)
    return pieces, num_bytes


def frame_head(kind: int, meta: bytes, payload_bytes: int) -> bytes:
    try:
        return HEADER.pack(MAGIC, VERSION, kind, len(meta), payload_bytes) + meta
    except struct.error as error:
        raise ValueError(f"message kind {kind!r} must be a number from 0 to 65535") from error


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
        self.held_kind: int | None = None
        self._header = memoryview(bytearray(HEADER.size))
        self._target = self._header  # the part of a frame that is being read
        self._filled = 0
        self._kind = self._meta_len = self._payload_len = 0
        self._meta: bytes | None = None

    def read(self, pipe: Pipe) -> Frame | None:
        """A frame once it is whole, else None. Raises PeerGone."""
        if self._target is self._header and not self._filled:
            buffer, start, end = pipe.window()
            if start == end:
                return None
            if end - start >= HEADER.size:
                self._parse(buffer, start)
                middle = start + HEADER.size + self._meta_len
                if middle <= end:
                    meta = bytes(buffer[start + HEADER.size : middle])
                    last = middle + self._payload_len
                    if last <= end and self._kind == self.held_kind and (hold := pipe.hold(last - start)) is not None:
                        return self._kind, meta, buffer[middle:last], hold
                    payload = _aligned_buffer(self._payload_len)
                    if last <= end:  # nearly always: the whole frame is here
                        payload[:] = buffer[middle:last]
                        pipe.consume(last - start)
                        return self._kind, meta, payload, None
                    pipe.consume(middle - start)
                    self._meta, self._target = meta, payload
        return self._read_on(pipe)

    def is_mid_frame(self) -> bool:
        return self._filled > 0 or self._target is not self._header

    def _read_on(self, pipe: Pipe) -> Frame | None:
        """Goes on with a frame that arrives in parts."""
        while self._fill(pipe):
            self._filled = 0
            if self._target is self._header:
                self._parse(self._header, 0)
                self._target = memoryview(bytearray(self._meta_len))
            elif self._meta is None:
                self._meta = bytes(self._target)
                self._target = _aligned_buffer(self._payload_len)
            else:
                meta, payload = self._meta, self._target
                self._meta, self._target = None, self._header
                return self._kind, meta, payload, None
        return None

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


def _aligned_buffer(num_bytes: int) -> memoryview:
    if not num_bytes:
        return memoryview(bytearray())
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8).data  # not cleared, as a bytearray would be
    start = -addressof(c_char.from_buffer(buffer)) % ALIGNMENT
    return buffer[start : start + num_bytes]
