"""Takes the latent rows of prompts that a prefill worker computes, and knows which of them have not come."""

from __future__ import annotations

import time

from .cache_memory import CacheMemory
from .kv_transfer import checksum_of, runs
from .links import Link, Message
from .messages import KV_LAYER
from .sequence import Sequence


class Damaged(Exception):
    """Rows of a sequence arrived other than they were sent: they count as missing."""


class KvReceiver:
    """The decode worker's half of a KV transfer."""

    def __init__(self, memory: CacheMemory, num_layers: int, checksums: bool) -> None:
        self._memory = memory
        self._num_layers = num_layers
        self._checksums = checksums
        self._receiving: dict[tuple[str, int], Sequence] = {}  # by prefill worker and number

    def is_open(self, sequence: Sequence) -> bool:
        return (sequence.source, sequence.number) in self._receiving

    def open(self, sequence: Sequence) -> None:
        """Its blocks are reserved: every row is to come but those of a cached prefix."""
        self._receiving[sequence.source, sequence.number] = sequence
        sequence.kv_missing = [(1 << sequence.num_prompt) - (1 << sequence.cached_tokens)] * self._num_layers

    def take(self, peer: str, number: int) -> Sequence | None:
        """No more rows of it are awaited."""
        return self._receiving.pop((peer, number), None)

    def receive(self, link: Link, message: Message) -> None:
        """Writes one layer's rows into the sequence's blocks, but for those of a prefix that is shared here.

        Rows of a refused or cancelled sequence are dropped. Raises Damaged and ValueError, having written nothing.
        """
        layer, number, start, num, checksum = KV_LAYER.unpack(message.meta)
        sequence = self._receiving.get((link.peer.name, number))
        if sequence is None:
            return
        payload, row_bytes = message.payload, self._memory.row_bytes
        told = f"layer {layer} of positions {start} to {start + num - 1} of {sequence.id}"
        if layer >= self._num_layers or start + num > sequence.num_prompt or payload.nbytes != num * row_bytes:
            raise ValueError(f"{told}, in {payload.nbytes} bytes: it has {sequence.num_prompt} rows of {row_bytes}")
        if self._checksums and checksum_of([payload]) != checksum:
            raise Damaged(f"{told} arrived damaged from {link.peer.name}: their checksum is not the one that was sent")
        skipped = min(max(sequence.cached_tokens - start, 0), num)
        blocks = runs(sequence.block_table, start + skipped, num - skipped)
        self._memory.write(layer, blocks, payload[skipped * row_bytes :])
        sequence.kv_started_ns = sequence.kv_started_ns or time.time_ns()
        sequence.kv_bytes += payload.nbytes
        sequence.kv_missing[layer] &= ~((1 << start + num) - (1 << start))
