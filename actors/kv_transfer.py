"""Hands the latent KV cache of a prompt from a prefill worker to a decode worker, layer by layer, while it is computed.

KV_OPEN reserves blocks at the decode worker and is sent when the prompt is queued; KV_ACCEPTED says how many leading
positions it holds already, from an earlier prompt with the same beginning; KV_LAYER carries one layer's rows of one
chunk as soon as that layer has run; KV_DONE carries the first token and starts decoding; KV_ABORT frees.

Rows go from the cache's memory straight into the link, block by block, and from the message into the other cache: the
blocks of a sequence are few and large, so that there is nothing to gather.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..model.kv_cache import BLOCK_SIZE
from ..model.sampling_params import SamplingParams
from .cache_memory import CacheMemory, Reading, Runs
from .links import Link, LinkClosed, LinkFull, Message
from .messages import KV_LAYER, Kind, pack, unpack
from .sequence import Sequence

log = logging.getLogger(__name__)


class Damaged(Exception):
    """Rows of a sequence arrived other than they were sent: it cannot go on here."""

    def __init__(self, sequence: Sequence, layer: int, start: int, num: int, peer: str) -> None:
        told = f"layer {layer} of positions {start} to {start + num - 1} of its KV cache arrived damaged from {peer}"
        super().__init__(f"{told}: their checksum is not the one that was sent")
        self.sequence = sequence


def runs(block_table: list[int], start: int, num: int) -> Runs:
    """Where positions [start, start + num) lie in a layer seen as [num_blocks * BLOCK_SIZE, latent_dim].

    Pairs of first row and number of rows, in the order of the positions; neighbours are joined.
    """
    found: Runs = []
    position, end = start, start + num
    while position < end:
        offset = position % BLOCK_SIZE
        count = min(BLOCK_SIZE - offset, end - position)
        row = block_table[position // BLOCK_SIZE] * BLOCK_SIZE + offset
        if found and sum(found[-1]) == row:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((row, count))
        position += count
    return found


def open_message(sequence: Sequence) -> bytes:
    """Everything the decode worker needs to go on with the sequence later."""
    return pack(
        {
            "number": sequence.number,
            "id": sequence.id,
            "front": sequence.front,
            "prompt": sequence.tokens[: sequence.num_prompt],
            "params": sequence.params.to_wire(),
            "carrier": sequence.carrier,
            "deadline": sequence.deadline,
            "priority": sequence.priority,
            "caller": sequence.caller,
        }
    )


def sequence_from_open(meta: bytes, source: str) -> Sequence:
    body: dict[str, Any] = unpack(meta)
    return Sequence(
        id=body["id"],
        front=body["front"],
        target="",
        tokens=body["prompt"],
        num_prompt=len(body["prompt"]),
        params=SamplingParams.from_wire(body["params"]),
        carrier=body["carrier"],
        deadline=body["deadline"],
        number=body["number"],
        source=source,
        priority=body["priority"],
        caller=body["caller"],
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [start, start + num) of a sequence on their way to its decode worker."""

    sequence: Sequence
    link: Link
    start: int
    num: int
    runs: Runs


def take_spans(sequence: Sequence, link: Link, end: int) -> list[Span]:
    """What of the positions below `end` has not left yet; it counts as sent from now on.

    A cached prefix waits until the decode worker has told what it holds itself: two spans, once it has.
    """
    low = sequence.kv_have if sequence.accepted else sequence.cached_tokens
    first, last = sequence.kv_sent or (low, low)
    sequence.kv_sent = (min(low, first), end)
    spans = [(low, first), (max(last, low), end)]
    return [
        Span(sequence, link, start, stop - start, runs(sequence.block_table, start, stop - start))
        for start, stop in spans
        if start < stop
    ]


class LayerSender:
    """The forward pass's `on_layer` hook: ships a layer's rows of the spans. Where they lie was found once for all.

    Rows of a device's cache leave when they have reached the host, while later layers compute; `finish` waits for the
    last. `is_whole`: whether the pass has lost nothing so far, asked once a layer's rows are here. After a loss nothing
    more leaves; if the pass is then run again, no layer leaves twice: those that did have the bits they get again.
    """

    def __init__(
        self, memory: CacheMemory, spans: list[Span], checksums: bool, is_whole: Callable[[], bool] = lambda: True
    ) -> None:
        self._memory = memory
        self._spans = spans
        self._checksums = checksums
        self._is_whole = is_whole
        self._num_sent = 0  # layers
        self._reading: deque[tuple[int, list[tuple[Span, Reading]]]] = deque()

    def __call__(self, layer: int) -> None:
        if self._spans and layer >= self._num_sent:
            spans = [span for span in self._spans if not span.link.closed]  # its Closed event fails the sequence later
            self._reading.append((layer, [(span, self._memory.read(layer, span.runs)) for span in spans]))
        while self._reading and all(reading.is_there() for _, reading in self._reading[0][1]) and self._is_whole():
            self._send_next()

    def finish(self) -> None:
        """Each layer leaves as soon as its rows are here; forgets those that a loss has spoilt."""
        while self._reading:
            for _, reading in self._reading[0][1]:
                reading.pieces()
            if not self._is_whole():
                self._reading.clear()
                return
            self._send_next()

    def _send_next(self) -> None:
        layer, readings = self._reading.popleft()
        for span, reading in readings:
            if span.link.queued_bytes:  # where no layer waits for experts, nobody else looks after links during a pass
                span.link.flush()
            self._send(layer, span, reading)
        self._num_sent = layer + 1

    def _send(self, layer: int, span: Span, reading: Reading) -> None:
        sequence, began_ns = span.sequence, time.time_ns()
        sequence.kv_started_ns = sequence.kv_started_ns or began_ns
        pieces = reading.pieces()
        checksum = checksum_of(pieces) if self._checksums else 0
        meta = KV_LAYER.pack(layer, sequence.number, span.start, span.num, checksum)
        try:
            span.link.send(Kind.KV_LAYER, meta, *pieces)
        except (LinkClosed, LinkFull, ValueError) as error:  # the decode worker counts its rows and refuses to start
            log.warning("layer %d of %s not sent to %s: %s", layer, sequence.id, span.link.peer.name, error)
        sequence.kv_bytes += sum(piece.nbytes for piece in pieces)
        sequence.kv_send_ns += time.time_ns() - began_ns


def receive_layer(
    memory: CacheMemory,
    receiving: dict[tuple[str, int], Sequence],
    link: Link,
    message: Message,
    checksums: bool,
) -> None:
    """Writes one layer's rows into the sequence's blocks, but for those of a prefix that is shared with others here.

    Rows of a refused or cancelled sequence are dropped. Raises Damaged, having written nothing.
    """
    layer, number, start, num, checksum = KV_LAYER.unpack(message.meta)
    sequence = receiving.get((link.peer.name, number))
    if sequence is None:
        return
    payload, row_bytes = message.payload, memory.row_bytes
    if checksums and checksum_of([payload]) != checksum:
        raise Damaged(sequence, layer, start, num, link.peer.name)
    assert payload.nbytes == num * row_bytes, f"{link.peer.name} announced {num} rows and sent {payload.nbytes} bytes"
    skipped = min(max(sequence.cached_tokens - start, 0), num)
    memory.write(layer, runs(sequence.block_table, start + skipped, num - skipped), payload[skipped * row_bytes :])
    sequence.kv_started_ns = sequence.kv_started_ns or time.time_ns()
    sequence.kv_bytes += payload.nbytes
    sequence.rows_received += num - skipped


def checksum_of(pieces: list[memoryview]) -> int:
    """CRC-32 of the pieces one after the other; 1 to 3 GB/s."""
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum
