"""The queue behind a full pipe: order, copies and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from braid.actors.pipe import Piece, Pipe
from braid.actors.send_queue import SendQueue


class NarrowPipe:
    """Takes a few bytes whenever it is asked, as the list says, then none."""

    transport = "unix"

    def __init__(self, room: list[int]) -> None:
        self._room, self.got = room, b""

    def write(self, pieces: Sequence[Piece]) -> int:
        part = b"".join(pieces)[: self._room.pop(0) if self._room else 0]
        self.got += part
        return len(part)


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=9)), written=st.integers(0, 40), room=st.lists(st.integers(1, 12))
)
def test_every_byte_leaves_once_and_in_order(pieces: list[bytes], written: int, room: list[int]) -> None:
    stream = b"".join(pieces)[written:]
    queue, pipe = SendQueue(), NarrowPipe(room)
    queue.put(pieces, written)
    assert queue.num_bytes == len(stream)
    assert queue.drain(cast(Pipe, pipe)) == (not queue)
    assert pipe.got == stream[: len(pipe.got)]
    assert len(pipe.got) + queue.num_bytes == len(stream)
    assert queue.drain(cast(Pipe, NarrowPipe([len(stream)])))


def test_the_callers_buffer_is_copied() -> None:
    buffer = bytearray(b"abcdef")
    queue, pipe = SendQueue(), NarrowPipe([100])
    queue.put([b"12", memoryview(buffer)], 3)
    buffer[:] = b"......"
    assert queue.drain(cast(Pipe, pipe))
    assert pipe.got == b"bcdef"
    assert not queue
