"""A part of a batch on its way through the layers, and how a batch is cut into parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .config import ModelConfig
from .mla import AttentionPlan, Segment, plan_attention
from .ops import Operand, Ops
from .rope import RopeTable
from .step_buffers import StepBuffers, StepRows


@dataclass(slots=True)
class MicroBatch:
    """Rows on their way through the layers: the residual stream is `rows.x` plus, if `has_delta`, `rows.delta`."""

    buffers: StepBuffers
    rows: StepRows
    plan: AttentionPlan
    rope: RopeTable
    first_row: int = 0  # its place in the batch
    has_delta: bool = False
    handle: Any = None  # while rows are away at the experts

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        config: ModelConfig,
        ops: Ops,
        rope: RopeTable,
        buffers: StepBuffers,
        first_row: int = 0,
    ) -> MicroBatch:
        """With everything but `rows.x`, and what `turn` is to find out."""
        plan = plan_attention(segments, config.num_attention_heads, config.latent_dim, ops, buffers)
        if plan.shape is not None:
            buffers.absorbed(plan.shape[0])  # its memory must not move while calls are noted
        rows = buffers.rows(len(plan.positions))
        return cls(buffers, rows, plan, rope, first_row)

    def turn(self, ops: Ops) -> None:
        """Looks up by how much each row is turned: before the first layer, and noted with it."""
        self.rope.fill(self.plan.positions, self.rows.cos, self.rows.sin, ops.gather)

    def run(self, name: Hashable, work: Callable[[], object]) -> None:
        """Kernel calls over the step's buffers: noted the first time that a batch of this shape makes them."""
        if self.plan.shape is None:
            work()
        else:
            self.buffers.tapes.run((name, self.plan.shape), work)

    def norm(self, ops: Ops, weight: Tensor, eps: float, out: Operand, has_delta: bool = True) -> Operand:
        """The norm of the residual stream, with what the last half layer gave."""
        if has_delta:
            return ops.add_rms_norm(self.rows.x, self.rows.delta, weight, eps, out=out)
        return ops.rms_norm(self.rows.x, weight, eps, out=out)


def split_segments(segments: list[Segment], count: int) -> list[list[Segment]]:
    """At most `count` parts of about as many rows each, in the rows' order; a segment may be cut."""
    total = sum(segment.num for segment in segments)
    count = max(min(count, total), 1)
    if count == 1:
        return [segments]
    parts: list[list[Segment]] = [[]]
    first = 0
    for segment in segments:
        start, left = segment.start, segment.num
        while left:
            end = total * len(parts) // count  # of the part that is being filled
            num = min(left, end - first)
            parts[-1].append(Segment(start, num, segment.block_table, segment.absorbed))
            start, left, first = start + num, left - num, first + num
            if first == end and first < total:
                parts.append([])
    return parts


def pick_segments(segments: Sequence[Segment], rows: Sequence[int]) -> list[Segment]:
    """The segments of these rows of the batch, in the order given."""
    segment_of_row = [segment for segment in segments for _ in range(segment.num)]
    place_in_segment = [place for segment in segments for place in range(segment.num)]
    picked: list[Segment] = []
    for index, row in enumerate(rows):
        segment, start = segment_of_row[row], segment_of_row[row].start + place_in_segment[row]
        if index and rows[index - 1] == row - 1 and segment is segment_of_row[row - 1]:
            picked[-1].num += 1
        else:
            picked.append(Segment(start, 1, segment.block_table, segment.absorbed))
    return picked
