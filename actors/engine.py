"""The step of an attention worker: schedule, run, postprocess.

Everything here happens on one thread: no locks, and no Ray (DESIGN law 1).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ..model.config import ModelConfig
from ..model.deepseek import Batch, DeepSeekModel, ForwardOutput, Segment
from ..model.row_sampler import RowSampler, sampler_for
from ..model.sampler import Ask, NothingToSample, SampledToken, prompt_logprobs
from ..model.to_device import Numbers
from .ahead import Ahead, look_ahead
from .answers import item_of, wire_logprob
from .drafter import Drafter
from .expert_side import ExpertSide
from .kv_sender import LayerSender
from .overlap import Overlap
from .requests import Requests
from .scheduler import Chunk, Plan
from .sequence import Sequence
from .unseen_rows import Computed


class Engine:
    """Runs what the scheduler plans for one attention worker's requests."""

    def __init__(
        self,
        config: ModelConfig,
        model: DeepSeekModel,
        experts: ExpertSide,
        requests: Requests,
        drafter: Drafter | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.experts = experts
        self.requests = requests
        self.scheduler = requests.scheduler
        self.drafter = drafter
        self.forward_s = 0.0  # in the network, the wait for expert rows among it
        self.host_s = 0.0  # the rest of the steps that had something to run
        self.overlap = Overlap()
        self._running: Plan = []  # until what comes after it has been planned
        self._ahead: Ahead | None = None
        self._token_ids, self._logit_rows = Numbers(), Numbers()

    def step(self) -> bool:
        """Runs one batch. False when there was nothing to run.

        What came of it leaves at once, or, where a step leaves the host time, in the middle of the next one.
        """
        started, forward_s = time.perf_counter(), self.forward_s
        self.requests.expire()
        plan, batch = self._next_batch()
        if plan:
            self._run(plan, batch)
        else:
            self.requests.hand_over([])
        if not plan or not self._has_time:
            self.requests.peers.flush()
        if plan:
            spent = time.perf_counter() - started
            self.host_s += spent - (self.forward_s - forward_s)
            if self.drafter is not None and all(chunk.absorbed for chunk in plan):
                self.drafter.note_step(len(batch.token_ids), spent)
        return bool(plan)

    @property
    def _has_time(self) -> bool:
        """Whether a step leaves the host time: while rows are away at the experts, or while the device computes."""
        return self.experts.has_waits or self.requests.cache.layers[0].is_cuda

    def meanwhile(self) -> None:
        """What need not be done between two steps: telling what the last one brought, and planning the next one."""
        self.requests.peers.flush()
        if self._running:
            self._ahead, self._running = look_ahead(self.scheduler, self._running), []

    def _next_batch(self) -> tuple[Plan, Batch]:
        ahead, self._ahead = self._ahead, None
        wants_hidden = self.drafter is not None
        if ahead is not None and ahead.holds(self.scheduler):
            return ahead.plan, ahead.batch(wants_hidden)
        plan = self.scheduler.plan()
        return plan, self._batch_of(plan, wants_hidden)

    def _batch_of(self, plan: Plan, wants_hidden: bool) -> Batch:
        """Chunk by chunk: generated rows in the absorbed form first, then prompt rows in the MHA form."""
        tokens: list[int] = []
        segments: list[Segment] = []
        logit_rows: list[int] = []
        for chunk in plan:
            tokens += [*chunk.sequence.tokens[chunk.start : chunk.start + chunk.num], *chunk.drafts]
            segments.append(Segment(chunk.start, chunk.num_rows, chunk.sequence.block_table, chunk.absorbed))
            logit_rows += range(len(tokens) - _num_logit_rows(chunk), len(tokens))
        return Batch(self._token_ids.put(tokens), segments, self._logit_rows.put(logit_rows), wants_hidden)

    def _run(self, plan: Plan, batch: Batch) -> None:
        started = time.perf_counter()
        prompts = [chunk for chunk in plan if not chunk.absorbed]
        now = time.time_ns()
        for chunk in prompts:
            chunk.sequence.started_ns = chunk.sequence.started_ns or now
        self.experts.phase = 0 if len(prompts) < len(plan) else 1
        on_layer = self.requests.layer_sender(plan, lambda: self.experts.is_whole)
        if prompts:
            self.requests.peers.flush()  # such a pass is long: who was handed over before it need not wait for its end
        phase, num_rows, waited = self.experts.phase, len(batch.token_ids), self.experts.wait_s
        count = self.overlap.choose(phase, num_rows)
        begun, self._running = time.perf_counter(), plan
        try:
            output, sampler = self._forward(plan, batch, on_layer, count)
        finally:
            self._running = []
            lost_rows = self.experts.take_failed()  # rows of this batch: none may be left for the next one
        self.forward_s += time.perf_counter() - begun
        self.overlap.observe(phase, num_rows, count, time.perf_counter() - started, self.experts.wait_s - waited)
        self.experts.end_step()
        self.requests.counters["steps"] += 1
        self.requests.counters["tokens"] += len(batch.token_ids)
        computed = self._postprocess(plan, output.logits, sampler, lost_rows)
        if self.drafter is not None:
            if prompts:
                self.requests.peers.flush()  # a first token need not wait until the module has read its prompt
            self.forward_s += self.drafter.run(computed, output.hidden, len(self.scheduler.decoding), on_layer)
        self.requests.hand_over(plan)

    def _forward(self, plan: Plan, batch: Batch, on_layer: LayerSender, count: int) -> tuple[ForwardOutput, RowSampler]:
        """Once, or, where rows can be lost on the way, until none was: the same inputs give the same bits (law 4)."""
        while True:
            may_redo = self.experts.may_redo
            output = self.model.forward(batch, on_layer, count)
            sampler = sampler_for(output.logits, lambda: self._asks(plan))
            if output.logits.is_cuda:
                self.meanwhile()
            on_layer.finish()  # the device computes still: each layer's rows leave before the next one's are there
            if not may_redo or self.experts.is_settled():
                return output, sampler

    def _postprocess(
        self, plan: Plan, logits: torch.Tensor, sampler: RowSampler, lost_rows: dict[int, str]
    ) -> list[Computed]:
        """Chunk by chunk: fails, scores, samples, ends or goes on. Returns the rows that stay."""
        computed = list[Computed]()
        row = logit_row = 0
        for chunk in plan:
            has_sampled, num_logits, num_drafts = chunk.is_last, _num_logit_rows(chunk), len(chunk.drafts)
            lost = min((place for place in lost_rows if row <= place < row + chunk.num_rows), default=None)
            if lost is not None and lost < row + chunk.num:
                self.requests.fail(chunk.sequence, "unavailable", lost_rows[lost])
            elif not _scores_prompt(chunk) or self._score_prompt(chunk, logits[logit_row : logit_row + num_logits]):
                last_row = logit_row + num_logits - num_drafts - 1
                num_drafts = num_drafts if lost is None else lost - row - chunk.num
                num_accepted = self._sample(chunk, num_drafts, sampler, last_row) if has_sampled else 0
                if not has_sampled:
                    self.scheduler.computed(chunk)
                num = chunk.num + num_accepted
                computed.append(Computed(chunk.sequence, chunk.start, num, row, chunk.absorbed, has_sampled))
            row += chunk.num_rows
            logit_row += num_logits
        return computed

    def _score_prompt(self, chunk: Chunk, logits: torch.Tensor) -> bool:
        """False when there is no sense in the logits."""
        try:
            _extend_prompt_logprobs(chunk, logits)
        except NothingToSample as error:
            self.requests.fail(chunk.sequence, "internal", str(error))
            return False
        return True

    def _sample(self, chunk: Chunk, num_drafts: int, sampler: RowSampler, row: int) -> int:
        """The next token of a sequence, and those after it as long as its drafts come true. Returns how many did.

        `row` is the last known token's; the drafts' follow. A draft whose row lost an expert counts as wrong: were it
        right, the next step would ask for the same row again.
        """
        sequence, tokens = chunk.sequence, list[SampledToken]()
        if sequence.params.max_tokens == 0:
            self.scheduler.computed(chunk)
            self.requests.finish(sequence, item_of(sequence, [], "length"))
            return 0
        failure: NothingToSample | None = None
        try:
            for ahead in range(num_drafts + 1):
                tokens.append(self._token(sequence, ahead, sampler, row + ahead))
                if ahead == num_drafts or not self._goes_on(sequence, tokens, chunk.drafts[ahead]):
                    break
        except NothingToSample as error:  # ends this sequence, and no other of the batch
            failure = error
        if self.drafter is not None and chunk.drafts:
            pairs = zip(tokens, chunk.drafts[:num_drafts], strict=False)
            num_accepted = sum(token.token_id == draft for token, draft in pairs)
            self.drafter.verified(sequence, len(chunk.drafts), min(num_drafts, len(tokens)), num_accepted)
        if tokens:
            self.scheduler.computed(chunk, len(tokens) - 1)
            self.requests.append(sequence, tokens)
        if failure is not None and sequence.state != "finished":
            self._fail_unsampled(sequence, sampler.is_finite(row + len(tokens)), failure)
        return max(len(tokens) - 1, 0)

    def _token(self, sequence: Sequence, ahead: int, sampler: RowSampler, row: int) -> SampledToken:
        params = sequence.params
        banned = sequence.banned_ids(ahead, self.config.eos_token_ids) if params.min_tokens else ()
        return sampler.token(row, params, len(sequence.tokens) + ahead, banned)

    def _asks(self, plan: Plan) -> Iterator[Ask]:
        """What `_sample` may ask for: of each sequence the last known row's token, and those after its drafts."""
        end = 0
        for chunk in plan:
            end += _num_logit_rows(chunk)
            sequence, first = chunk.sequence, end - 1 - len(chunk.drafts)
            for ahead in range(1 + len(chunk.drafts)) if chunk.is_last and sequence.params.max_tokens else ():
                banned = sequence.banned_ids(ahead, self.config.eos_token_ids)
                yield Ask(first + ahead, sequence.params, len(sequence.tokens) + ahead, banned)

    def _goes_on(self, sequence: Sequence, tokens: list[SampledToken], draft: int) -> bool:
        """Whether the next row's input is the token just sampled, and that one does not end the sequence."""
        params, token_id = sequence.params, tokens[-1].token_id
        is_full = sequence.num_generated + len(tokens) >= params.max_tokens
        return token_id == draft and not is_full and token_id not in params.stop_ids(self.config.eos_token_ids)

    def _fail_unsampled(self, sequence: Sequence, is_finite: bool, error: NothingToSample) -> None:
        if is_finite:
            told = f"min_tokens is {sequence.params.min_tokens}, but stop_token_ids and end tokens leave no other token"
            self.requests.fail(sequence, "invalid", told)
        else:
            self.requests.fail(sequence, "internal", str(error))


def _scores_prompt(chunk: Chunk) -> bool:
    """A replay has told its prompt's log-probabilities already."""
    sequence = chunk.sequence
    return not chunk.absorbed and sequence.params.prompt_logprobs is not None and not sequence.num_generated


def _num_logit_rows(chunk: Chunk) -> int:
    """All rows of a prompt that is scored; else the last known one and its drafts, where a token is to be sampled."""
    return chunk.num if _scores_prompt(chunk) else (1 + len(chunk.drafts)) * chunk.is_last


def _extend_prompt_logprobs(chunk: Chunk, logits: torch.Tensor) -> None:
    """Row i of a chunk predicts position start + i + 1; the first prompt token has no prediction."""
    sequence = chunk.sequence
    top = sequence.params.prompt_logprobs
    assert top is not None
    if not sequence.prompt_logprobs:
        sequence.prompt_logprobs.append(None)
    targets = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.num + 1, sequence.num_prompt)]
    scored = prompt_logprobs(logits[: len(targets)], torch.tensor(targets, dtype=torch.int64), top)
    sequence.prompt_logprobs.extend(wire_logprob(token) for token in scored)
