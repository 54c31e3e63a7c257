"""Multi-head latent attention of one layer: projections, rope, the cache write, and both attention forms.

Prompt rows take the MHA form, generated rows the absorbed form; they round differently, so which form a token takes is
part of its identity (DESIGN law 5) and never a matter of convenience.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .kv_cache import BLOCK_SIZE, blocks_for
from .network_weights import LayerWeights
from .ops import Operand, Ops
from .step_buffers import StepBuffers, StepRows
from .to_device import on_device, send

LATENT_NORM_EPS = 1e-6  # DeepSeek's own code leaves the two latent norms at this default, whatever rms_norm_eps says


@dataclass(slots=True)
class Segment:
    """Consecutive positions of one sequence and the form they take: prompt (MHA) or generated (absorbed)."""

    start: int
    num: int
    block_table: list[int]
    absorbed: bool


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one form: those of one prompt segment, or of any number of absorbed ones."""

    rows: slice
    absorbed: bool
    plan: Any  # what the family's kernel takes


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attention must know of a batch; made once, used by every layer.

    `shape`: of a batch of absorbed rows only, whose plan lies in the step's buffers: equal ones differ in content only.
    """

    positions: Tensor  # int64 [N]
    slots: Tensor  # int64 [N], where each row's latent goes
    runs: tuple[Run, ...]
    shape: tuple[int, int] | None = None


def plan_attention(
    segments: Sequence[Segment], num_heads: int, latent_dim: int, ops: Ops, buffers: StepBuffers | None = None
) -> AttentionPlan:
    segments = [segment for segment in segments if segment.num]
    if buffers is not None and segments and all(segment.absorbed for segment in segments):
        return _plan_absorbed(segments, num_heads, latent_dim, ops, buffers)
    tables = _tables(segments)
    nums = np.array([segment.num for segment in segments], dtype=np.int64)
    ends = nums.cumsum()
    segment_of_row = np.arange(len(segments)).repeat(nums)
    before = np.array([segment.start for segment in segments], dtype=np.int64) - ends + nums
    positions = np.arange(len(segment_of_row)) + before[segment_of_row]
    slots = tables[segment_of_row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    positions_there = on_device(torch.from_numpy(positions), ops.device)
    runs, first = [], 0
    for absorbed, last in _runs(segments):
        rows = slice(int(ends[first - 1]) if first else 0, int(ends[last - 1]))
        if absorbed:
            own_tables = on_device(torch.from_numpy(tables[segment_of_row[rows]]), ops.device)
            firsts = on_device(torch.from_numpy((ends - nums)[segment_of_row[rows]] - rows.start), ops.device)
            plan = ops.plan_decode(positions_there[rows], own_tables, firsts, num_heads, latent_dim)
        else:
            table = on_device(torch.from_numpy(tables[first]), ops.device)
            plan = ops.plan_prefill(segments[first].start, segments[first].num, table)
        runs.append(Run(rows, absorbed, plan))
        first = last
    return AttentionPlan(positions_there, on_device(torch.from_numpy(slots), ops.device), tuple(runs))


def _plan_absorbed(
    segments: Sequence[Segment], num_heads: int, latent_dim: int, ops: Ops, buffers: StepBuffers
) -> AttentionPlan:
    """Few rows, in every decode step: written one by one into memory that stays, which is quicker than whole arrays."""
    num_rows = sum(segment.num for segment in segments)
    fixed = buffers.decode_inputs(num_rows, max(blocks_for(segment.start + segment.num) for segment in segments))
    row = 0
    for segment in segments:
        table, end = segment.block_table, segment.start + segment.num
        width = blocks_for(end)
        assert len(table) >= width, f"{len(table)} blocks do not reach position {end - 1}"
        first, own_table = row, table[:width]
        for position in range(segment.start, end):
            slot = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            fixed.write(row, position, slot, first)
            fixed.write_table(row, own_table)
            row += 1
    there = fixed.read
    if there is not fixed.written:
        send(fixed.written.numbers, there.numbers)
    before = None if fixed.plan is None else fixed.plan.runs[0].plan
    plan = ops.plan_decode(there.positions, there.block_tables, there.firsts, num_heads, latent_dim, before)
    if plan is not before:
        run = Run(slice(0, num_rows), True, plan)
        fixed.plan = AttentionPlan(there.positions, there.slots, (run,), (num_rows, there.block_tables.shape[1]))
    made: AttentionPlan = fixed.plan
    return made


def _runs(segments: Sequence[Segment]) -> Iterator[tuple[bool, int]]:
    """Form and end (as a place among the segments) of each run."""
    for index, segment in enumerate(segments):
        goes_on = segment.absorbed and index + 1 < len(segments) and segments[index + 1].absorbed
        if not goes_on:
            yield segment.absorbed, index + 1


def _tables(segments: Sequence[Segment]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[segments, width]; what a table has less than the widest is block 0, which nobody reads."""
    widths = [-(-(segment.start + segment.num) // BLOCK_SIZE) for segment in segments]
    tables = np.zeros((len(segments), max(widths, default=0)), dtype=np.int64)
    for row, (segment, width) in enumerate(zip(segments, widths, strict=True)):
        end = segment.start + segment.num
        assert len(segment.block_table) >= width, f"{len(segment.block_table)} blocks do not reach position {end - 1}"
        tables[row, :width] = segment.block_table[:width]
    return tables


class LatentAttention:
    def __init__(self, config: ModelConfig, weights: LayerWeights, ops: Ops) -> None:
        self._config = config
        self._weights = weights
        self._ops = ops

    def write_latents(self, x: Operand, slots: Tensor, cache_layer: Tensor, rows: StepRows) -> None:
        """x: [N, H] normed hidden rows; puts their latents into the cache, and their low-rank queries into `rows`."""
        config, weights = self._config, self._weights
        self._ops.linear(x, weights.qkv_a_proj, weights.qkv_a_bias, out=rows.qkv_a)
        norm, interleaved = weights.kv_a_layernorm, config.rope_interleave
        self._ops.write_latents(rows.latent, norm, LATENT_NORM_EPS, rows.cos, rows.sin, slots, cache_layer, interleaved)

    def attend(self, plan: AttentionPlan, cache_layer: Tensor, rows: StepRows, buffers: StepBuffers) -> Tensor:
        """Follows write_latents of the same rows -> [N, H]."""
        self._make_queries(rows)
        num_rows = rows.x.shape[0]
        for run in plan.runs:
            at = run.rows
            if at.stop - at.start < num_rows:  # a mixed batch: views of the run's rows
                cos_sin, nope, rope = (rows.cos[at], rows.sin[at]), rows.q_nope[at], rows.q_rope[at]
                q, values = rows.q[at], rows.values[at]
            else:
                cos_sin, nope, rope = (rows.cos, rows.sin), rows.q_nope, rows.q_rope
                q, values = rows.q, rows.values
            if run.absorbed:
                self._absorbed(nope, rope, *cos_sin, run.plan, cache_layer, buffers, values)
            else:
                self._prefill(q, rope, *cos_sin, run.plan, cache_layer, values)
        return self._ops.linear(rows.values_flat, self._weights.o_proj, self._weights.o_proj_bias, out=rows.delta)

    def _make_queries(self, rows: StepRows) -> None:
        weights = self._weights
        if weights.q_b_proj is not None:
            assert weights.q_a_layernorm is not None, "q_b_proj without q_a_layernorm"
            low = self._ops.rms_norm(rows.q_a, weights.q_a_layernorm, LATENT_NORM_EPS, out=rows.q_a_normed)
            self._ops.linear(low, weights.q_b_proj, out=rows.q_flat)

    def _prefill(
        self, q: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, plan: Any, cache_layer: Tensor, out: Tensor
    ) -> None:
        config = self._config
        self._ops.rope(q_rope, cos, sin, config.rope_interleave, out=q_rope)
        scale = config.softmax_scale
        self._ops.mla_prefill(q, cache_layer, self._weights.kv_b_proj, plan, scale, config.v_head_dim, out=out)

    def _absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: Any,
        cache_layer: Tensor,
        buffers: StepBuffers,
        out: Tensor,
    ) -> None:
        """The key up-projection is applied to the query, the value up-projection to the attended latent."""
        config, weights, ops = self._config, self._weights, self._ops
        rows = buffers.absorbed(q_nope.shape[0])
        ops.head_linear(q_nope, weights.w_uk, out=rows.q_latent)
        ops.rope(q_rope, cos, sin, config.rope_interleave, out=rows.q_rope)
        ops.mla_decode(rows.q, cache_layer, plan, config.softmax_scale, config.kv_lora_rank, out=rows.attended)
        ops.head_linear(rows.attended, weights.w_uv, out=out)
