"""Sends the latent rows of prompts to decode workers: what a step computes layer by layer, the rest as links have room.

Rows that a link has no room for wait where they lie, in blocks that their sequence holds: nothing is copied for them,
and a sequence that ends takes what it had waiting with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .cache_memory import CacheMemory, Reading, Runs
from .kv_transfer import checksum_of, runs
from .links import Link, LinkClosed
from .messages import KV_LAYER, Kind
from .reactor import MAX_MESSAGES_A_TURN
from .sequence import Sequence

Rows = tuple[int, int, int]  # layer, and the positions [start, stop) of a sequence


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [start, start + num) of a sequence on their way to its decode worker."""

    sequence: Sequence
    link: Link
    start: int
    num: int
    runs: Runs


class KvSender:
    """All rows that leave one worker."""

    def __init__(self, memory: CacheMemory, num_layers: int, checksums: bool) -> None:
        self.memory = memory
        self._layers = range(num_layers)
        self._checksums = checksums
        self._waiting: dict[Sequence, tuple[Link, deque[Rows]]] = {}  # the one that sent last comes last

    def is_waiting(self, sequence: Sequence) -> bool:
        return sequence in self._waiting

    @property
    def has_room(self) -> bool:
        """Whether rows that wait could leave at once."""
        return any(_room_of(link) > 0 for link, _ in self._waiting.values())

    def take(self, sequence: Sequence, link: Link, num_computed: int, end: int) -> list[Span]:
        """What of the positions below `end` has not left yet; it counts as sent from now on.

        Those that have been computed leave by `drain`, the others are returned: they leave layer by layer. A cached
        prefix stays until the decode worker has told what it holds itself.
        """
        low = sequence.kv_have if sequence.accepted else sequence.cached_tokens
        first, last = sequence.kv_sent or (low, low)
        sequence.kv_sent = (min(low, first), end)
        fresh = max(last, low, num_computed)
        self._put(sequence, link, self._layers, low, first)
        self._put(sequence, link, self._layers, max(last, low), min(fresh, end))
        if fresh >= end:
            return []
        return [Span(sequence, link, fresh, end - fresh, runs(sequence.block_table, fresh, end - fresh))]

    def send(self, span: Span, layer: int, reading: Reading) -> None:
        """Rows that have just been computed: at once, or after what a link that is behind has to send first."""
        if span.num * self.memory.row_bytes > _room_of(span.link):
            self._put(span.sequence, span.link, range(layer, layer + 1), span.start, span.start + span.num)
        else:
            self._send(span.sequence, span.link, (layer, span.start, span.start + span.num), reading)

    def drain(self) -> list[Sequence]:
        """Sends what links have room for, a message of each sequence in turn; returns whose rows have all left.

        However fast its other end reads, a link takes no more than it had room for at the beginning: steps go on.
        """
        done, budgets = [], {link: _room_of(link) for link, _ in self._waiting.values()}
        while sequence := next((s for s, (link, _) in self._waiting.items() if budgets[link] > 0), None):
            link, waiting = self._waiting.pop(sequence)
            budgets[link] = min(budgets[link] - self._send_next(sequence, link, waiting), _room_of(link))
            if waiting:
                self._waiting[sequence] = link, waiting
            else:
                done.append(sequence)
        return done

    def forget(self, sequence: Sequence) -> None:
        """Its blocks are about to be freed."""
        self._waiting.pop(sequence, None)

    def _put(self, sequence: Sequence, link: Link, layers: range, start: int, stop: int) -> None:
        if start < stop:
            _, waiting = self._waiting.setdefault(sequence, (link, deque()))
            waiting.extend((layer, start, stop) for layer in layers)

    def _send_next(self, sequence: Sequence, link: Link, waiting: deque[Rows]) -> int:
        """One message; returns its bytes."""
        layer, start, stop = waiting.popleft()
        end = min(stop, start + _max_rows(link, self.memory.row_bytes))
        if end < stop:
            waiting.appendleft((layer, end, stop))
        reading = self.memory.read(layer, runs(sequence.block_table, start, end - start))
        self._send(sequence, link, (layer, start, end), reading)
        return (end - start) * self.memory.row_bytes

    def _send(self, sequence: Sequence, link: Link, rows: Rows, reading: Reading) -> None:
        layer, start, stop = rows
        began_ns = time.time_ns()
        sequence.kv_started_ns = sequence.kv_started_ns or began_ns
        pieces = reading.pieces()
        checksum = checksum_of(pieces) if self._checksums else 0
        with suppress(LinkClosed):  # its Closed event ends the sequence
            link.send(Kind.KV_LAYER, KV_LAYER.pack(layer, sequence.number, start, stop - start, checksum), *pieces)
        sequence.kv_bytes += (stop - start) * self.memory.row_bytes
        sequence.kv_send_ns += time.time_ns() - began_ns


class LayerSender:
    """The forward pass's `on_layer` hook: ships a layer's rows of the spans. Where they lie was found once for all.

    Rows of a device's cache leave when they have reached the host, while later layers compute; `finish` waits for the
    last. `is_whole`: whether the pass has lost nothing so far, asked once a layer's rows are here. After a loss nothing
    more leaves; if the pass is then run again, no layer leaves twice: those that did have the bits they get again.
    """

    def __init__(self, sender: KvSender, spans: list[Span], is_whole: Callable[[], bool] = lambda: True) -> None:
        self._sender = sender
        self._spans = spans
        self._is_whole = is_whole
        self._num_sent = 0  # layers
        self._reading: deque[tuple[int, list[tuple[Span, Reading]]]] = deque()

    def __call__(self, layer: int) -> None:
        if self._spans and layer >= self._num_sent:
            spans = [span for span in self._spans if not span.link.closed]  # its Closed event fails the sequence later
            read = self._sender.memory.read
            self._reading.append((layer, [(span, read(layer, span.runs)) for span in spans]))
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
            if span.sequence.state == "finished":  # by a pass that raised: its blocks are somebody else's
                continue
            if span.link.queued_bytes:  # where no layer waits for experts, nobody else looks after links during a pass
                span.link.flush()
            self._sender.send(span, layer, reading)
        self._num_sent = layer + 1


def _room_of(link: Link) -> int:
    """Rows take half of what may queue: the rest is for messages that cannot wait elsewhere."""
    return 0 if link.closed else link.max_queued_bytes // 2 - link.queued_bytes


def _max_rows(link: Link, row_bytes: int) -> int:
    """Of a message: as many messages as a poll of the other end may bring are no more than a full queue."""
    return max(link.max_queued_bytes // MAX_MESSAGES_A_TURN // row_bytes, 1)
