"""Drafts tokens with the MTP module from what a step has just computed; the next step verifies them in one pass.

A draft is sampled from the module's distribution under the very noise, of (request seed, absolute position), that the
main model's distribution will be sampled with at that place: where the two agree, so do the tokens. The module's
latents are one more layer of the cache. Rows that it has missed cost acceptance, never a token (DESIGN laws 4 and 5).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.deepseek import OnLayer, Segment
from ..model.kv_cache import BLOCK_SIZE
from ..model.mtp import MtpModule
from ..model.row_sampler import RowSampler, sampler_for
from ..model.sampler import Ask, NothingToSample
from ..model.to_device import Numbers, on_device
from .drafting import Drafting
from .expert_side import ExpertSide
from .sequence import Sequence
from .speculation import Speculation
from .unseen_rows import Computed, Rows, UnseenRows


@dataclass(slots=True)
class Pass:
    """One run of the module in the making. `wanted`: the sequences whose last row shall give a draft, with that row."""

    hidden: list[Rows] = field(default_factory=list)
    next_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    wanted: list[tuple[Sequence, int]] = field(default_factory=list)

    def add(self, sequence: Sequence, start: int, rows: list[Rows], next_ids: list[int], absorbed: bool) -> None:
        self.hidden += rows
        self.next_ids += next_ids
        self.segments.append(Segment(start, len(next_ids), sequence.block_table, absorbed))

    def want(self, sequence: Sequence) -> None:
        """A draft after the row that was added last."""
        self.wanted.append((sequence, len(self.next_ids) - 1))


class Drafter:
    """Used by the engine's thread only."""

    def __init__(self, config: ModelConfig, module: MtpModule, experts: ExpertSide) -> None:
        self.config = config
        self.module = module
        self.experts = experts
        self.speculation = Speculation()
        self.num_drafted = 0
        self.num_accepted = 0
        self._module_s = 0.0
        self._drafting_s = 0.0  # of this step: the module's passes with what is sampled from them
        self._unseen = UnseenRows()
        self._next_ids, self._logit_rows = Numbers(), Numbers()

    def verified(self, sequence: Sequence, num_drafted: int, num_reached: int, num_accepted: int) -> None:
        """Of the drafts of one step, how many there were, were looked at before the sequence ended, and have stayed."""
        drafting = self._drafting(sequence)
        for total in (self, drafting):
            total.num_drafted += num_drafted
            total.num_accepted += num_accepted
        self.speculation.verified(drafting.acceptance, num_reached, num_accepted)

    def run(self, computed: list[Computed], hidden: Tensor, num_decoding: int, on_layer: OnLayer | None) -> float:
        """Leaves drafts with the sequences; returns the seconds that the module took.

        hidden: [N, H] of the step; `on_layer` hears when its rows are written.
        """
        spent, self._drafting_s = self._module_s, 0.0
        self.speculation.start(num_decoding)
        pending, depths, unseen = Pass(), dict[Sequence, int](), list[Computed]()
        for each in computed:
            sequence = each.sequence
            sequence.drafts = []
            if sequence.state == "finished":
                continue
            can_wait = each.absorbed and each.has_sampled
            depth = 0 if can_wait and self.speculation.is_off else self._depth(each)
            if can_wait and not depth:
                unseen.append(each)
                continue
            before = self._unseen.before(sequence, each.start)
            start = each.start - sum(num for _, _, num in before)
            next_ids = sequence.tokens[start + 1 : each.start + each.num + 1]
            pending.add(sequence, start, [*before, (hidden, each.row, each.num)], next_ids, each.absorbed)
            if depth:
                depths[sequence] = depth
                pending.want(sequence)
        if unseen:
            self._unseen.keep(hidden, unseen)
        while pending.segments:
            pending = self._after(self._run(pending, on_layer), depths)
            on_layer = None
        return self._module_s - spent

    def note_step(self, num_rows: int, seconds: float) -> None:
        """What a step of generated rows took in all. What is not drafting grows with the rows that were verified."""
        self.speculation.step_costs.observe(num_rows, seconds - self._drafting_s)

    def _drafting(self, sequence: Sequence) -> Drafting:
        if sequence.drafting is None:
            sequence.drafting = Drafting(self.speculation.new_sequence())
        return sequence.drafting

    def _depth(self, each: Computed) -> int:
        sequence = each.sequence
        room = sequence.params.max_tokens - sequence.num_generated - 1  # the step after gives one token without drafts
        if not each.has_sampled or room <= 0:
            return 0
        depth = self.speculation.depth(self._drafting(sequence).acceptance)
        if sequence.state == "handover":  # where it goes on, its depth is judged by what passes cost there
            return min(depth, 1)
        return min(depth, room)

    def _run(self, pending: Pass, on_layer: OnLayer | None) -> list[tuple[Sequence, Rows]]:
        """Appends a draft to each wanted sequence that gets one; returns these with their rows of the output."""
        started = time.perf_counter()
        forms = {segment.absorbed for segment in pending.segments}
        self.experts.phase = 0 if True in forms else 1
        next_ids = self._next_ids.put(pending.next_ids)
        logit_rows = self._logit_rows.put([row for _, row in pending.wanted])
        try:
            drafted = self.module.draft(_gathered(pending.hidden), next_ids, pending.segments, logit_rows, on_layer)
        finally:
            lost_rows = self.experts.take_failed()  # these get no draft, which is all the harm it does
        self._module_s += time.perf_counter() - started
        sampler, guessed = sampler_for(drafted.logits, lambda: self._asks(pending)), []
        for place, (sequence, row) in enumerate(pending.wanted):
            token_id = None if row in lost_rows else _guess(sampler, self._ask(place, sequence))
            if token_id is not None:
                sequence.drafts.append(token_id)
                guessed.append((sequence, (drafted.hidden, place, 1)))
        if self.experts.may_redo:
            self.experts.is_settled()  # what was lost here costs drafts only
        took = time.perf_counter() - started
        self._drafting_s += took
        if False not in forms:
            self.speculation.draft_costs.observe(len(next_ids), took)
        return guessed

    def _asks(self, pending: Pass) -> Iterator[Ask]:
        return (self._ask(place, sequence) for place, (sequence, _) in enumerate(pending.wanted))

    def _ask(self, place: int, sequence: Sequence) -> Ask:
        """For the draft after those that the sequence has."""
        ahead = len(sequence.drafts)
        banned = sequence.banned_ids(ahead, self.config.eos_token_ids)
        return Ask(place, sequence.params, len(sequence.tokens) + ahead, banned)

    def _after(self, guessed: list[tuple[Sequence, Rows]], depths: dict[Sequence, int]) -> Pass:
        """The module once more, on its own output for the row before the draft, where a deeper draft is wanted."""
        pending = Pass()
        for sequence, rows in guessed:
            position = len(sequence.tokens) + len(sequence.drafts) - 2
            has_block = position // BLOCK_SIZE < len(sequence.block_table)
            if len(sequence.drafts) < depths[sequence] and has_block:
                pending.add(sequence, position, [rows], sequence.drafts[-1:], absorbed=True)
                pending.want(sequence)
        return pending


def _guess(sampler: RowSampler, ask: Ask) -> int | None:
    """The drafted token; None where the module's logits make no sense."""
    try:
        return sampler.choose(ask.row, ask.params, ask.position, ask.banned)
    except NothingToSample:
        return None


def _gathered(pieces: list[Rows]) -> Tensor:
    """[N, H]: all the rows, one piece after the other."""
    hidden, begin, num = pieces[0]
    if len(pieces) == 1:
        return hidden if num == len(hidden) else hidden[begin : begin + num]
    if any(other is not hidden for other, _, _ in pieces):
        return torch.cat([rows[first : first + num] for rows, first, num in pieces])
    rows = [row for _, first, num in pieces for row in range(first, first + num)]
    return hidden if len(rows) == len(hidden) else hidden.index_select(0, on_device(torch.tensor(rows), hidden.device))
