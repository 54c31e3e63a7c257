"""The next step, planned while the current one runs: all of it but the tokens that this one is about to give.

Only what is plain to see is planned ahead: everybody goes on to decode, and nobody else has a place. If anything came
between, `Scheduler.plan` is asked when the step is due. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.deepseek import Batch, Segment
from .scheduler import Chunk, Plan, Scheduler


@dataclass(frozen=True, slots=True)
class Ahead:
    """One row of each decoding sequence; logit_rows: int64 [N], all of them."""

    plan: Plan
    segments: list[Segment]
    logit_rows: Tensor

    def holds(self, scheduler: Scheduler) -> bool:
        """Whether `scheduler.plan()` would say the same now, and do nothing else."""
        return (
            not scheduler.has_prompts_to_run
            and scheduler.decoding == [chunk.sequence for chunk in self.plan]
            and not any(chunk.sequence.drafts for chunk in self.plan)
            and all(chunk.start == chunk.sequence.num_computed and chunk.is_last for chunk in self.plan)
        )

    def batch(self, wants_hidden: bool) -> Batch:
        """Now that the tokens are known."""
        newest = torch.tensor([chunk.sequence.tokens[-1] for chunk in self.plan])
        return Batch(newest, self.segments, self.logit_rows, wants_hidden)


def look_ahead(scheduler: Scheduler, running: Plan) -> Ahead | None:
    """What follows on `running` if nobody comes and nobody ends but by length. Takes the blocks it needs, from nobody.

    None where more must be decided than that, or where the next step's rows hang on what becomes of drafts.
    """
    is_steady = all(chunk.absorbed and chunk.is_last and not chunk.drafts for chunk in running)
    staying = [chunk for chunk in running if _goes_on(chunk)]
    if not is_steady or not staying or scheduler.has_prompts_to_run:
        return None
    plan = [Chunk(chunk.sequence, chunk.start + 1, 1, absorbed=True) for chunk in staying]
    full = [chunk.sequence for chunk in plan if not chunk.sequence.reaches(chunk.start + 1)]
    if len(full) > scheduler.allocator.num_free:
        return None
    for sequence in full:
        sequence.block_table += scheduler.allocator.allocate(1)
    segments = [Segment(chunk.start, 1, chunk.sequence.block_table, True) for chunk in plan]
    return Ahead(plan, segments, torch.arange(len(plan)))


def _goes_on(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return sequence.state == "decode" and sequence.num_generated + 1 < sequence.params.max_tokens
