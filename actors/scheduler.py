"""Continuous batching: which rows of which sequences run in the next step. Pure: no clock, no socket, no tensor.

A sequence takes blocks as it grows. When none is left, the running sequence of the lowest priority, and of these the
newest, is preempted: it gives up its blocks, waits ahead of everything of its priority, and is replayed from its
tokens, to the same bits: the prompt in the MHA form, what it had generated in the absorbed form (DESIGN law 5).
The same happens to it when one of better priority finds no place and no blocks.
The oldest sequence of the highest priority is never a victim, so it always comes to its end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from operator import attrgetter

from ..model.kv_cache import BLOCK_SIZE, BlockAllocator, OutOfBlocks, blocks_for
from ..router.fair_queue import FairQueue
from ..router.prefix_keys import prefix_keys
from .sequence import Sequence

RANK, URGENCY = attrgetter("rank"), attrgetter("urgency")
LEAST_SHARE, LARGEST_SHARE = 1 / 8, 1 / 4  # of a step's rows, for prompts while sequences decode


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
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.prefilling: list[Sequence] = []
        self.receiving: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.counters: Counter[str] = Counter(prefix_query_tokens=0, prefix_hit_tokens=0, preemptions=0)
        self._num_entered = 0

    # ---- sequences come and go

    def submit(self, sequence: Sequence) -> bool:
        """Queues a prompt; False when the queue is full or the sequence could never fit."""
        if not self._could_fit(sequence) or len(self.waiting) >= self.max_waiting:
            return False
        self._enter(sequence)
        self.waiting.push(sequence, sequence.priority, sequence.caller)
        return True

    def reserve(self, sequence: Sequence) -> bool:
        """Takes blocks for a sequence whose prompt another worker computes; False when there is no room now.

        `cached_tokens` of the prompt are here already. Whoever was preempted here comes before newcomers.
        """
        is_replay_due = any(s.num_generated and s.priority <= sequence.priority for s in self.waiting)
        if is_replay_due or not self._could_fit(sequence):
            return False
        worse = self._worse_than(sequence)
        while not self._take_place(sequence, self._keys(sequence)):
            if not worse:
                return False
            self._preempt(worse.pop())
        self._enter(sequence)
        sequence.state = "receiving"
        self.receiving.append(sequence)
        return True

    def start_decode(self, sequence: Sequence) -> None:
        """The prompt's latent rows are all here and the first token is known."""
        queue = self.receiving if sequence.state == "receiving" else self.prefilling
        queue.remove(sequence)
        self._publish(sequence)
        sequence.state = "decode"
        self.decoding.append(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """Rows that another worker was to send are missing: it is replayed here, as after a preemption."""
        self._put_back(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out wherever it stands and frees its blocks at once."""
        assert sequence.state != "finished", f"sequence {sequence.id} finished twice"
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._take_out(sequence)
        sequence.state = "finished"

    def _enter(self, sequence: Sequence) -> None:
        sequence.order, self._num_entered = self._num_entered, self._num_entered + 1

    # ---- a step

    def plan(self) -> Plan:
        """Decodes first, then prompts: a better priority before older ones, callers in turn."""
        self._grow()
        self._make_way()
        budget = self.max_batch_tokens - len(self.decoding)
        known_rows = self._known_rows(budget)
        chunks: Plan = []
        for sequence in self.decoding:
            chunk = Chunk(sequence, sequence.num_computed, 1, absorbed=True)
            if sequence.drafts or not chunk.is_last:
                chunk = self._extended(chunk, min(known_rows, budget), budget)
                budget -= chunk.num_rows - 1
                known_rows -= chunk.num - 1
            chunks.append(chunk)
        return chunks + self._prompt_chunks(min(known_rows, budget))

    def _known_rows(self, budget: int) -> int:
        """How many rows of prompts and replays a step may have beside one row for each decoding sequence.

        As large a share as those who could have rows are among all who want a token: where many prompts come at once
        most of those waiting wait for their first one, and few large steps bring them it sooner than many small ones.
        A quarter at most all the same: the time between two tokens stays within what a quarter of a batch takes, and
        larger shares brought the prompts next to nothing (docs/performance.md).
        """
        num_running = sum(sequence.num_computed + 1 == len(sequence.tokens) for sequence in self.decoding)
        if not num_running:
            return budget
        num_places = self.max_sequences - self._num_decoders
        num_replaying = len(self.decoding) - num_running
        num_waiting = len(self._begun()) + min(len(self.waiting), num_places) + num_replaying
        share = min(max(num_waiting / (num_waiting + num_running), LEAST_SHARE), LARGEST_SHARE)
        return min(budget, max(int(share * self.max_batch_tokens), BLOCK_SIZE))

    def _begun(self) -> list[Sequence]:
        """Prompts in the middle of being computed, the best placed first."""
        return sorted((s for s in self.prefilling if s.state == "prefill"), key=RANK)

    def _extended(self, chunk: Chunk, max_known: int, max_drafts: int) -> Chunk:
        """In a replay, as many more of the known rows as there is room for; else the drafts after the newest token."""
        sequence, length = chunk.sequence, len(chunk.sequence.tokens)
        if not chunk.is_last:
            return replace(chunk, num=min(length - chunk.start, 1 + max_known))
        wanted = max(min(len(sequence.drafts), max_drafts, sequence.max_length - length), 0)
        if not sequence.reaches(length + wanted) and self.allocator.num_free:
            sequence.block_table += self.allocator.allocate(1)
        fitting = min(wanted, len(sequence.block_table) * BLOCK_SIZE - length)
        return replace(chunk, drafts=tuple(sequence.drafts[:fitting]))

    def _prompt_chunks(self, budget: int) -> Plan:
        """Rows go to the prompt with least left, so that none waits behind a long one; half of them to the oldest."""
        begun = self._begun()
        rows = {sequence: min(budget // 2, sequence.num_left) for sequence in begun[:1]}
        budget -= sum(rows.values())
        shortest = deque(sorted(begun, key=URGENCY))
        while budget > 0:
            head = self.waiting.peek()
            is_head_next = head is not None and (not shortest or head.urgency < shortest[0].urgency)
            if head is not None and is_head_next and self._admit(head):
                sequence = head
            elif shortest:
                sequence = shortest.popleft()
            else:
                break
            num = min(budget, sequence.num_left - rows.get(sequence, 0))
            rows[sequence] = rows.get(sequence, 0) + num
            budget -= num
        return [Chunk(sequence, sequence.num_computed, num, absorbed=False) for sequence, num in rows.items() if num]

    def _admit(self, sequence: Sequence) -> bool:
        """The head of the queue gets its blocks; one that does not fit yet keeps its place, and no other overtakes."""
        is_scored = sequence.params.prompt_logprobs is not None and not sequence.num_generated
        keys = [] if is_scored else self._keys(sequence)[: (sequence.num_prompt - 1) // BLOCK_SIZE]
        if not self._take_place(sequence, keys):
            return False
        if not sequence.num_generated:
            self.counters["prefix_query_tokens"] += sequence.num_prompt
            self.counters["prefix_hit_tokens"] += sequence.cached_tokens
        self.waiting.pop()
        sequence.state = "prefill"
        self.prefilling.append(sequence)
        return True

    @property
    def has_prompts_to_run(self) -> bool:
        """Whether the next step may have rows of prompts, or preempts somebody for the sake of one."""
        head = self.waiting.peek()
        return bool(self._begun()) or (head is not None and (self._has_place(head) or bool(self._worse_than(head))))

    def _has_place(self, sequence: Sequence) -> bool:
        return bool(sequence.target) or self._num_decoders < self.max_sequences

    @property
    def _num_decoders(self) -> int:
        """Sequences that decode here or will, wherever their prompt is computed."""
        return len(self.receiving) + len(self.decoding) + sum(not sequence.target for sequence in self.prefilling)

    def computed(self, chunk: Chunk, num_accepted: int = 0) -> None:
        """A step has run: the latent rows of the chunk, and of its first `num_accepted` drafts, are in the cache."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.start + chunk.num + num_accepted
        if not chunk.absorbed:
            self._publish(sequence)
            if sequence.num_computed == sequence.num_prompt and sequence.num_generated:
                self.start_decode(sequence)  # a replay: the tokens it had generated are known rows now

    @property
    def num_waiting_tokens(self) -> int:
        waiting = sum(len(sequence.tokens) for sequence in self.waiting)
        return waiting + sum(s.num_prompt - s.num_computed for s in self.prefilling)

    def all(self) -> list[Sequence]:
        return [*self.waiting, *self.prefilling, *self.receiving, *self.decoding]

    def check(self) -> None:
        """Invariants: every block is free, idle or held by exactly those whose tables name it."""
        self.allocator.check([sequence.block_table for sequence in self.all()])
        for sequence in self.all():
            has_room = len(sequence.block_table) * BLOCK_SIZE >= sequence.num_computed
            assert has_room, f"{sequence.id}: {sequence.num_computed} rows in {len(sequence.block_table)} blocks"

    # ---- blocks

    def _grow(self) -> None:
        """Gives every decoding sequence room for its newest token, the best placed first."""
        full = [sequence for sequence in self.decoding if not sequence.reaches(len(sequence.tokens))]
        for sequence in sorted(full, key=RANK):
            while sequence.state == "decode" and not sequence.reaches(len(sequence.tokens)):
                if self.allocator.num_free:
                    sequence.block_table += self.allocator.allocate(1)
                else:
                    self._preempt(max(self._victims(), key=RANK))

    def _make_way(self) -> None:
        """Who is next in the queue takes the place and the blocks of somebody of worse priority, if it finds none."""
        head = self.waiting.peek()
        if head is None or (self._has_place(head) and self._num_blocks(head) + self._spare <= self.allocator.num_free):
            return
        worse = self._worse_than(head)
        while worse and not self._admit(head):
            self._preempt(worse.pop())

    def _worse_than(self, newcomer: Sequence) -> list[Sequence]:
        """Whom it may preempt, the worst last; nobody, where all that they hold would not be enough for it."""
        worse = sorted((s for s in self._victims() if s.priority > newcomer.priority), key=RANK)
        held = sum(len(sequence.block_table) for sequence in worse)
        return worse if self._num_blocks(newcomer) <= self.allocator.num_free + held else []

    def _victims(self) -> list[Sequence]:
        """Those whose end depends on nobody else: rows on their way to or from another worker are not asked twice."""
        return self.decoding + [s for s in self.prefilling if s.state == "prefill" and not s.target]

    def _preempt(self, sequence: Sequence) -> None:
        self._put_back(sequence)
        self.counters["preemptions"] += 1

    def _put_back(self, sequence: Sequence) -> None:
        """Ahead of everything of its priority, with all its tokens and no blocks."""
        self._take_out(sequence)
        sequence.state = "waiting"
        sequence.num_computed = 0
        sequence.drafts = []
        sequence.prompt_logprobs = []  # sent with the first token, or begun anew
        self.waiting.put_back(sequence, sequence.priority, sequence.caller)

    def _num_blocks(self, sequence: Sequence) -> int:
        """For what is known and the next token."""
        return blocks_for(min(len(sequence.tokens) + 1, self._positions(sequence)))

    @property
    def _spare(self) -> int:
        """Those who decode want a block each within 64 tokens: half of that is left to them, or they would soon have
        to preempt the newcomer. (In a simulated overload this saved a sixth of all rows.)"""
        return len(self.decoding) // 2

    def _take_place(self, sequence: Sequence, keys: Items[bytes]) -> bool:
        """A place and blocks; those under `keys` that are here need not be computed."""
        if not self._has_place(sequence):
            return False
        try:
            blocks, num_shared = self.allocator.allocate_after(keys, self._num_blocks(sequence), self._spare)
        except OutOfBlocks:
            return False
        sequence.block_table = blocks
        sequence.cached_tokens = sequence.num_computed = num_shared * BLOCK_SIZE
        return True

    def _take_out(self, sequence: Sequence) -> None:
        for queue in (self.prefilling, self.receiving, self.decoding):
            if sequence in queue:
                queue.remove(sequence)
        self.allocator.free(sequence.block_table)
        sequence.block_table = []

    def _publish(self, sequence: Sequence) -> None:
        """What a prompt's full blocks hold is of use to others; generated rows have other bits, and stay private."""
        num_full = min(sequence.num_computed, sequence.num_prompt) // BLOCK_SIZE
        keys = self._keys(sequence)
        for block, key in zip(sequence.block_table, keys[:num_full], strict=False):
            self.allocator.publish(block, key)

    def _keys(self, sequence: Sequence) -> list[bytes]:
        if not sequence.prefix_keys:
            sequence.prefix_keys = prefix_keys(sequence.tokens[: sequence.num_prompt], BLOCK_SIZE)
        return sequence.prefix_keys

    def _could_fit(self, sequence: Sequence) -> bool:
        return blocks_for(self._positions(sequence)) <= self.allocator.num_total

    def _positions(self, sequence: Sequence) -> int:
        """How many rows of it this worker may ever hold."""
        return sequence.num_prompt if sequence.target else sequence.max_length
