"""Frames cut from a stream that arrives in any pieces, and what is refused."""

from __future__ import annotations

from ctypes import addressof, c_char
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.actors.framing import ALIGNMENT, HEADER, MAGIC, MAX_FRAME_BYTES, VERSION, Frame, FrameReader, frame_pieces
from braid.actors.pipe import PeerGone, Piece, Pipe


class Trickle:
    """A pipe from which the bytes arrive a few at a time."""

    transport = "unix"

    def __init__(self, stream: bytes, step: int) -> None:
        self._stream, self._step = memoryview(bytearray(stream)), step
        self._start = self._end = 0

    def arrive(self) -> bool:
        self._end = min(self._end + self._step, len(self._stream))
        return self._start < len(self._stream)

    def window(self) -> tuple[memoryview, int, int]:
        return self._stream, self._start, self._end

    def consume(self, num_bytes: int) -> None:
        self._start += num_bytes
        assert self._start <= self._end

    def read_into(self, target: memoryview) -> int:
        num_bytes = min(len(target), self._end - self._start)
        target[:num_bytes] = self._stream[self._start : self._start + num_bytes]
        self.consume(num_bytes)
        return num_bytes


def stream_of(kind: int, meta: bytes, *payload: Piece) -> bytes:
    return b"".join(frame_pieces(kind, meta, payload)[0])


def read_all(pipe: Trickle, held_kind: int | None = None) -> list[Frame]:
    reader, frames = FrameReader(), []
    reader.held_kind = held_kind
    while pipe.arrive():
        while (frame := reader.read(cast(Pipe, pipe))) is not None:
            frames.append(frame)
    assert not reader.is_mid_frame()
    return frames


@given(
    frames=st.lists(st.tuples(st.integers(0, 65_535), st.binary(max_size=30), st.binary(max_size=100)), max_size=6),
    step=st.integers(1, 200),
)
def test_frames_come_out_as_they_went_in(frames: list[tuple[int, bytes, bytes]], step: int) -> None:
    got = read_all(Trickle(b"".join(stream_of(*frame) for frame in frames), step))
    assert [(kind, meta, bytes(payload)) for kind, meta, payload, _ in got] == frames


@pytest.mark.parametrize("meta_len", [0, 1, 63, 64, 100])
def test_a_payload_is_aligned_and_its_own(meta_len: int) -> None:
    stream = bytearray(stream_of(1, bytes(meta_len), b"x" * 5000) * 2)
    first, second = (frame[2] for frame in read_all(Trickle(bytes(stream), len(stream))))
    assert addressof(c_char.from_buffer(first)) % ALIGNMENT == 0
    first[:] = b"y" * 5000
    assert second == b"x" * 5000


def test_a_payload_of_one_kind_stays_in_the_memory_of_a_pipe_that_can_hold_it() -> None:
    class Holding(Trickle):
        def hold(self, num_bytes: int) -> object | None:
            if num_bytes > 60:
                return None
            self.consume(num_bytes)
            return "held"

    frames = [(1, b"mine", b"other"), (7, b"mine", b"hello"), (7, b"", b""), (7, b"yours", b"x" * 100)]
    stream = b"".join(stream_of(*frame) for frame in frames)
    for step in (1, 50, len(stream)):
        got = read_all(Holding(stream, step), held_kind=7)
        assert [(kind, meta, bytes(payload)) for kind, meta, payload, _ in got] == frames
        assert [hold for _, _, _, hold in got][::3] == [None, None]
        if step == len(stream):
            assert [hold for _, _, _, hold in got] == [None, "held", "held", None]


def test_several_pieces_of_any_shape_are_one_payload() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    empty = np.empty((0, 4), np.int64)
    stream = stream_of(2, b"m", b"ab", matrix.data, empty.data, memoryview(b""), memoryview(b"cd"))
    ((_, _, payload, _),) = read_all(Trickle(stream, len(stream)))
    assert payload == b"ab" + matrix.tobytes() + b"cd"


@pytest.mark.parametrize("kind", [-1, 65_536, "one"])
def test_an_impossible_kind_is_refused(kind: int) -> None:
    with pytest.raises(ValueError, match=f"message kind {kind!r} must be a number from 0 to 65535"):
        frame_pieces(kind, b"", [])


def test_a_strided_payload_is_refused() -> None:
    with pytest.raises(ValueError, match="must be contiguous: copy it first"):
        frame_pieces(1, b"", [np.zeros((4, 4))[:, ::2].data])


def test_a_frame_beyond_the_limit_is_refused_by_its_sender() -> None:
    huge = np.empty(MAX_FRAME_BYTES, np.uint8)  # never touched, so it takes no memory
    with pytest.raises(ValueError, match="send it as several messages"):
        frame_pieces(1, b"", [huge.data])


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a frame of version 1: it begins with 474554"),
        (HEADER.pack(MAGIC, VERSION + 1, 1, 0, 0), "not a frame of version 1"),
        (HEADER.pack(MAGIC, VERSION, 1, 0, 1 << 62), "exceeds 1073741824"),
        (HEADER.pack(MAGIC, VERSION, 1, (1 << 32) - 1, 0), "exceeds 1073741824"),
    ],
)
@pytest.mark.parametrize("step", [1, 100])
def test_a_bad_header_ends_the_link(header: bytes, reason: str, step: int) -> None:
    with pytest.raises(PeerGone, match=reason):
        read_all(Trickle(header.ljust(64, b"."), step))
