"""Continuous batching: which sequences run in the next step. Pure: no clock, no socket, no tensor.

Every sequence reserves the blocks of its whole possible length when it is admitted, so a running sequence never has
to be preempted: a full cache makes newcomers wait, and a full queue refuses them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..model.kv_cache import BlockAllocator, blocks_for
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known positions [start, start + num) of one sequence, then its draft tokens; one form for all of its rows.

    Prompt positions take the MHA form, generated ones the absorbed form (DESIGN law 5): no chunk spans both.
    """

    sequence: Sequence
    start: int
    num: int
    absorbed: bool
    drafts: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num + len(self.drafts)

    @property
    def is_last(self) -> bool:
        """Whether every known position is computed by now: the last known row yields the next token."""
        return self.start + self.num == len(self.sequence.tokens)


Plan = list[Chunk]  # one step: a chunk of every decoding sequence, then prompt chunks up to the token budget


class Scheduler:
    """Owns the queues and the block accounting of one attention worker."""

    def __init__(self, allocator: BlockAllocator, max_sequences: int, max_batch_tokens: int, max_waiting: int) -> None:
        self.allocator = allocator
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.max_waiting = max_waiting
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.receiving: list[Sequence] = []
        self.decoding: list[Sequence] = []

    def submit(self, sequence: Sequence) -> bool:
        """Queues a prompt; False when the queue is full or the sequence could never fit."""
        too_long = blocks_for(self._positions(sequence)) > self.allocator.num_total
        if too_long or len(self.waiting) >= self.max_waiting:
            return False
        self.waiting.append(sequence)
        return True

    def reserve(self, sequence: Sequence) -> bool:
        """Takes blocks for a sequence whose prompt another worker computes; False when there is no room now."""
        if self._num_decoders >= self.max_sequences:
            return False
        if not self._allocate(sequence, sequence.max_length):
            return False
        sequence.state = "receiving"
        self.receiving.append(sequence)
        return True

    def start_decode(self, sequence: Sequence) -> None:
        """The prompt's latent rows are all here and the first token is known."""
        queue = self.receiving if sequence.state == "receiving" else self.prefilling
        queue.remove(sequence)
        sequence.state = "decode"
        self.decoding.append(sequence)

    def computed(self, chunk: Chunk, num_accepted: int = 0) -> None:
        """A step has run: the latent rows of the chunk, and of its first `num_accepted` drafts, are in the cache."""
        chunk.sequence.num_computed = chunk.start + chunk.num + num_accepted

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out wherever it stands and frees its blocks at once."""
        assert sequence.state != "finished", f"sequence {sequence.id} finished twice"
        for queue in (self.waiting, self.prefilling, self.receiving, self.decoding):
            if sequence in queue:
                queue.remove(sequence)
        self.allocator.free(sequence.block_table)
        sequence.block_table = []
        sequence.state = "finished"

    def plan(self) -> Plan:
        """Decodes first, then prompts in order of arrival; a prompt that does not fit yet keeps its place."""
        budget = self.max_batch_tokens - len(self.decoding)
        chunks = [Chunk(sequence, sequence.num_computed, 1, absorbed=True) for sequence in self.decoding]
        for sequence in self.prefilling:
            if sequence.state == "prefill" and budget > 0:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].num
        while self.waiting and budget > 0 and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.prefilling.append(sequence)
            chunks.append(self._chunk(sequence, budget))
            budget -= chunks[-1].num
        return chunks

    @property
    def num_waiting_tokens(self) -> int:
        waiting = sum(sequence.num_prompt for sequence in self.waiting)
        return waiting + sum(s.num_prompt - s.num_computed for s in self.prefilling)

    def all(self) -> list[Sequence]:
        return [*self.waiting, *self.prefilling, *self.receiving, *self.decoding]

    def check(self) -> None:
        """Invariants: every block is either free or owned by exactly one live sequence."""
        owned = [block for sequence in self.all() for block in sequence.block_table]
        assert len(owned) == len(set(owned)), "a block is owned by two sequences"
        total = len(owned) + self.allocator.num_free
        assert total == self.allocator.num_total, f"{self.allocator.num_total - total} blocks lost"

    @property
    def _num_decoders(self) -> int:
        """Sequences that decode here or will, wherever their prompt is computed."""
        return len(self.receiving) + len(self.decoding) + sum(not sequence.target for sequence in self.prefilling)

    def _positions(self, sequence: Sequence) -> int:
        return sequence.num_prompt if sequence.target else sequence.max_length

    def _admit(self, sequence: Sequence) -> bool:
        if not sequence.target and self._num_decoders >= self.max_sequences:
            return False
        if not self._allocate(sequence, self._positions(sequence)):
            return False
        sequence.state = "prefill"
        return True

    def _allocate(self, sequence: Sequence, num_positions: int) -> bool:
        needed = blocks_for(num_positions)
        if needed > self.allocator.num_free:
            return False
        sequence.block_table = self.allocator.allocate(needed)
        return True

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        num = min(budget, sequence.num_prompt - sequence.num_computed)
        return Chunk(sequence, sequence.num_computed, num, absorbed=False)
