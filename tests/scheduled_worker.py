"""A worker without tensors: a real Scheduler over a cache that remembers what every row was computed from.

A row is right when it was computed in its own form from its own sequence's tokens; before a row is computed, every row
it would attend to is looked at. What is generated depends on all tokens before it, so any mix-up changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from braid.actors.ahead import Ahead, look_ahead
from braid.actors.scheduler import Chunk, Plan, Scheduler
from braid.actors.sequence import Sequence
from braid.model.kv_cache import BLOCK_SIZE, BlockAllocator
from braid.model.sampling_params import SamplingParams

Row = tuple[str, int]  # form, hash of the tokens up to and with this one


def next_token(tokens: Items[int]) -> int:
    return hash(tuple(tokens)) % 1000


def answer_to(prompt: Items[int], max_tokens: int) -> list[int]:
    """What a sequence that nothing disturbs generates."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def sequence_of(
    name: str, prompt: Items[int], max_tokens: int = 8, target: str = "", priority: int = 0, caller: str = ""
) -> Sequence:
    params = SamplingParams(max_tokens)
    made = Sequence(name, "front-0", target, list(prompt), len(prompt), params, {}, 1e12)
    made.priority, made.caller = priority, caller
    return made


@dataclass
class ScheduledWorker:
    scheduler: Scheduler
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)
    sent: dict[str, list[int]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    drafts_right: int = 0
    is_drafting: bool = True
    ahead: Ahead | None = None
    seen_ahead: int = 0  # steps that were as planned ahead

    @classmethod
    def of(
        cls,
        num_blocks: int,
        max_sequences: int = 4,
        max_batch_tokens: int = 96,
        max_waiting: int = 8,
        is_drafting: bool = True,
    ) -> ScheduledWorker:
        scheduler = Scheduler(BlockAllocator(num_blocks), max_sequences, max_batch_tokens, max_waiting)
        return cls(scheduler, is_drafting=is_drafting)

    def step(self) -> Plan:
        seen = self.ahead.plan if self.ahead is not None and self.ahead.holds(self.scheduler) else None
        plan = self.scheduler.plan()
        assert seen in (None, plan), f"planned ahead: {seen}, now: {plan}"
        self.seen_ahead += seen is not None
        self.scheduler.check()
        assert sum(chunk.num_rows for chunk in plan) <= self.scheduler.max_batch_tokens
        for chunk in plan:
            self._write(chunk)
        self.ahead = look_ahead(self.scheduler, plan)
        for chunk in plan:
            self._take(chunk)
        self.scheduler.check()
        return plan

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"no end after {max_steps} steps: {self.scheduler.all()}")

    def receive(self, sequence: Sequence, is_whole: bool = True) -> None:
        """The rows of a remote prompt have come, unless they are damaged, and its first token with them."""
        for position in range(sequence.cached_tokens, sequence.num_prompt):
            self._put(sequence, position, "prompt" if is_whole else "damaged", sequence.tokens)
        self._send(sequence)
        if is_whole:
            sequence.num_computed = sequence.num_prompt
            self.scheduler.start_decode(sequence)
        else:
            self.scheduler.recompute(sequence)

    def _write(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        tokens = [*sequence.tokens[: chunk.start + chunk.num], *chunk.drafts]
        for position in range(chunk.start):
            form = "prompt" if position < sequence.num_prompt else "generated"
            found = self.rows[self._place(sequence, position)]
            assert found == (form, hash(tuple(tokens[: position + 1]))), f"{sequence.id} at {position}: {found}"
        assert chunk.absorbed == (chunk.start >= sequence.num_prompt), chunk
        assert chunk.absorbed or chunk.start + chunk.num <= sequence.num_prompt, chunk
        for position in range(chunk.start, chunk.start + chunk.num_rows):
            self._put(sequence, position, "generated" if chunk.absorbed else "prompt", tokens)

    def _put(self, sequence: Sequence, position: int, form: str, tokens: Items[int]) -> None:
        self.rows[self._place(sequence, position)] = form, hash(tuple(tokens[: position + 1]))

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE

    def _take(self, chunk: Chunk) -> None:
        """A draft is accepted when it is the token; one more token comes from the last accepted row."""
        sequence = chunk.sequence
        if not chunk.is_last:
            self.scheduler.computed(chunk)
            return
        num_accepted = 0
        for draft in chunk.drafts:
            if draft != next_token(sequence.tokens):
                break
            self._send(sequence)
            num_accepted += 1
        self.drafts_right += num_accepted
        self.scheduler.computed(chunk, num_accepted)
        if sequence.num_generated < sequence.params.max_tokens:
            self._send(sequence)
        if sequence.num_generated == sequence.params.max_tokens or sequence.target:
            self.scheduler.finish(sequence)
            self.finished.append(sequence.id)
        elif not chunk.absorbed:
            self.scheduler.start_decode(sequence)
        first = next_token(sequence.tokens)
        if self.is_drafting:
            sequence.drafts = [first, 7] if first % 3 else [7]  # right, then wrong; or wrong at once

    def _send(self, sequence: Sequence) -> None:
        token = next_token(sequence.tokens)
        sequence.tokens.append(token)
        self.sent.setdefault(sequence.id, []).append(token)
