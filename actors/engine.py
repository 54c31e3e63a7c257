"""The step of an attention worker: schedule, run, postprocess.

Everything here happens on one thread: no locks, and no Ray (DESIGN law 1).
"""

from __future__ import annotations

import time
from typing import Protocol

import torch

from ..model.config import ModelConfig
from ..model.deepseek import Batch, DeepSeekModel, Segment
from ..model.sampler import NothingToSample, SampledToken, prompt_logprobs, sample
from .kv_transfer import LayerSender
from .requests import Requests, wire_logprob
from .scheduler import Chunk, Plan
from .sequence import Sequence


class ExpertSide(Protocol):
    """What the engine asks of dispatch besides the model's ExpertBackend; colocated experts never fail."""

    phase: int

    def take_failed(self) -> dict[int, str]: ...

    def end_step(self) -> None: ...


class Engine:
    """Runs what the scheduler plans for one attention worker's requests."""

    def __init__(self, config: ModelConfig, model: DeepSeekModel, experts: ExpertSide, requests: Requests) -> None:
        self.config = config
        self.model = model
        self.experts = experts
        self.requests = requests
        self.scheduler = requests.scheduler

    def step(self) -> bool:
        """Runs one batch and sends what came of it. False when there was nothing to run."""
        self.requests.expire()
        plan = self.scheduler.plan()
        if plan:
            self._run(plan)
        self.requests.peers.flush()
        return bool(plan)

    def _run(self, plan: Plan) -> None:
        batch = _batch_of(plan)
        bound = [(chunk, link) for chunk in plan.prefill if (link := self.requests.kv_link(chunk.sequence))]
        now = time.time_ns()
        for chunk in plan.prefill:
            chunk.sequence.started_ns = chunk.sequence.started_ns or now
        self.experts.phase = 0 if plan.decode else 1
        try:
            logits = self.model.forward(batch, LayerSender(self.requests.cache, bound)).logits
        finally:
            lost_rows = self.experts.take_failed()  # rows of this batch: none may be left for the next one
        self.experts.end_step()
        self.requests.counters["steps"] += 1
        self.requests.counters["tokens"] += len(batch.token_ids)
        failed = self._fail_rows(plan, lost_rows)
        self._postprocess(plan, logits, failed)

    def _postprocess(self, plan: Plan, logits: torch.Tensor, failed: set[Sequence]) -> None:
        """logits rows: decode sequences, then per chunk all its rows (prompt log-probabilities) or its last one."""
        row = len(plan.decode)
        picks = [(sequence, index) for index, sequence in enumerate(plan.decode)]
        for chunk in plan.prefill:
            rows = _num_logit_rows(chunk)
            chunk.sequence.num_computed = chunk.start + chunk.num
            if chunk.sequence.params.prompt_logprobs is not None and chunk.sequence not in failed:
                try:
                    _extend_prompt_logprobs(chunk, logits[row : row + rows])
                except NothingToSample as error:
                    self.requests.fail(chunk.sequence, "internal", str(error))
                    failed.add(chunk.sequence)
            if chunk.is_last:
                picks.append((chunk.sequence, row + rows - 1))
            row += rows
        for sequence in plan.decode:
            sequence.num_computed += 1
        self._sample([(sequence, index) for sequence, index in picks if sequence not in failed], logits)

    def _sample(self, picks: list[tuple[Sequence, int]], logits: torch.Tensor) -> None:
        scoring = [sequence for sequence, _ in picks if sequence.params.max_tokens == 0]
        for sequence in scoring:
            self.requests.finish(sequence, self.requests.item(sequence, [], "length"))
        picks = [pick for pick in picks if pick[0] not in scoring]
        if not picks:
            return
        try:
            tokens = self._tokens(picks, logits)
        except NothingToSample as error:  # ends the sequences it concerns, and no other of the batch
            for row in error.rows:
                self._fail_unsampled(*picks[row], logits, error)
            self._sample([pick for row, pick in enumerate(picks) if row not in error.rows], logits)
            return
        for (sequence, _), token in zip(picks, tokens, strict=True):
            self.requests.append(sequence, token)

    def _tokens(self, picks: list[tuple[Sequence, int]], logits: torch.Tensor) -> list[SampledToken]:
        sequences = [sequence for sequence, _ in picks]
        eos = self.config.eos_token_ids
        return sample(
            logits[torch.tensor([index for _, index in picks])],
            [sequence.params for sequence in sequences],
            [len(sequence.tokens) for sequence in sequences],
            [s.params.banned_ids(s.num_generated, eos) for s in sequences],
        )

    def _fail_unsampled(self, sequence: Sequence, row: int, logits: torch.Tensor, error: NothingToSample) -> None:
        if torch.isfinite(logits[row].max()):
            told = f"min_tokens is {sequence.params.min_tokens}, but stop_token_ids and end tokens leave no other token"
            self.requests.fail(sequence, "invalid", told)
        else:
            self.requests.fail(sequence, "internal", str(error))

    def _fail_rows(self, plan: Plan, failed: dict[int, str]) -> set[Sequence]:
        if not failed:
            return set()
        owner_of_row = [*plan.decode]
        for chunk in plan.prefill:
            owner_of_row += [chunk.sequence] * chunk.num
        lost = {owner_of_row[row]: reason for row, reason in failed.items()}
        for sequence, reason in lost.items():
            self.requests.fail(sequence, "unavailable", reason)
        return set(lost)


def _num_logit_rows(chunk: Chunk) -> int:
    if chunk.sequence.params.prompt_logprobs is not None:
        return chunk.num
    return 1 if chunk.is_last else 0


def _batch_of(plan: Plan) -> Batch:
    """Decode rows first (one token each, absorbed form), then prompt chunks (MHA form)."""
    tokens = [sequence.tokens[-1] for sequence in plan.decode]
    segments = [Segment(s.num_computed, 1, s.block_table, absorbed=True) for s in plan.decode]
    logit_rows = list(range(len(tokens)))
    for chunk in plan.prefill:
        end = len(tokens) + chunk.num
        logit_rows += range(end - _num_logit_rows(chunk), end)
        tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.num]
        segments.append(Segment(chunk.start, chunk.num, chunk.sequence.block_table, absorbed=False))
    return Batch(torch.tensor(tokens), segments, torch.tensor(logit_rows, dtype=torch.int64))


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
