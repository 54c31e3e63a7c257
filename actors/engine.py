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
        prompts = [chunk for chunk in plan if not chunk.absorbed]
        now = time.time_ns()
        for chunk in prompts:
            chunk.sequence.started_ns = chunk.sequence.started_ns or now
        self.experts.phase = 0 if len(prompts) < len(plan) else 1
        try:
            logits = self.model.forward(batch, self.requests.layer_sender(plan)).logits
        finally:
            lost_rows = self.experts.take_failed()  # rows of this batch: none may be left for the next one
        self.experts.end_step()
        self.requests.counters["steps"] += 1
        self.requests.counters["tokens"] += len(batch.token_ids)
        self._postprocess(plan, logits, self._fail_rows(plan, lost_rows))
        self.requests.hand_over_ready(plan)

    def _postprocess(self, plan: Plan, logits: torch.Tensor, failed: set[Sequence]) -> None:
        """logits rows: per chunk all its rows (prompt log-probabilities), its last one (it yields a token) or none."""
        row = 0
        picks: list[tuple[Sequence, int]] = []
        for chunk in plan:
            rows = _num_logit_rows(chunk)
            if chunk.sequence not in failed and self._advance(chunk, logits[row : row + rows]):
                picks.append((chunk.sequence, row + rows - 1))
            row += rows
        self._sample(picks, logits)

    def _advance(self, chunk: Chunk, logits: torch.Tensor) -> bool:
        """Takes note of what the step computed for one sequence; True when its next token can be sampled."""
        self.scheduler.computed(chunk)
        if _scores_prompt(chunk):
            try:
                _extend_prompt_logprobs(chunk, logits)
            except NothingToSample as error:
                self.requests.fail(chunk.sequence, "internal", str(error))
                return False
        return chunk.is_last

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
        owner_of_row = [chunk.sequence for chunk in plan for _ in range(chunk.num_rows)]
        lost = {owner_of_row[row]: reason for row, reason in failed.items()}
        for sequence, reason in lost.items():
            self.requests.fail(sequence, "unavailable", reason)
        return set(lost)


def _scores_prompt(chunk: Chunk) -> bool:
    """A replay has told its prompt's log-probabilities already."""
    sequence = chunk.sequence
    return not chunk.absorbed and sequence.params.prompt_logprobs is not None and not sequence.num_generated


def _num_logit_rows(chunk: Chunk) -> int:
    return chunk.num if _scores_prompt(chunk) else int(chunk.is_last)


def _batch_of(plan: Plan) -> Batch:
    """Chunk by chunk: generated rows in the absorbed form first, then prompt rows in the MHA form."""
    tokens: list[int] = []
    segments: list[Segment] = []
    logit_rows: list[int] = []
    for chunk in plan:
        tokens += [*chunk.sequence.tokens[chunk.start : chunk.start + chunk.num], *chunk.drafts]
        segments.append(Segment(chunk.start, chunk.num_rows, chunk.sequence.block_table, chunk.absorbed))
        logit_rows += range(len(tokens) - _num_logit_rows(chunk), len(tokens))
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
