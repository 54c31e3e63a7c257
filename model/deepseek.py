"""The DeepSeek-V2/V3 network over a paged latent cache: one batch of rows in, logits of the wanted rows out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .experts import ExpertBackend, LocalExperts
from .kv_cache import LatentCache
from .mla import AttentionPlan, LatentAttention, Segment, plan_attention
from .moe import FeedForward
from .network_weights import AttentionWeights, LayerWeights
from .ops import Ops
from .rope import RopeTable
from .step_buffers import StepBuffers, StepRows

__all__ = ["Batch", "DecoderLayer", "DeepSeekModel", "ForwardOutput", "Segment"]

OnLayer = Callable[[int], None]


@dataclass(slots=True)
class Batch:
    """Rows of all segments, one after the other. `logit_rows`: int64, the rows whose logits are wanted."""

    token_ids: Tensor
    segments: list[Segment]
    logit_rows: Tensor


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """logits: fp32 [R, vocab] of `logit_rows`; hidden: [N, H] after the final norm, every row (what MTP reads)."""

    logits: Tensor
    hidden: Tensor


@dataclass(slots=True)
class MicroBatch:
    """Rows on their way through the layers: the residual stream is `rows.x` plus, if `has_delta`, `rows.delta`."""

    buffers: StepBuffers
    rows: StepRows
    plan: AttentionPlan
    has_delta: bool = False
    handle: Any = None  # while rows are away at the experts

    @classmethod
    def of(
        cls, segments: Sequence[Segment], config: ModelConfig, ops: Ops, rope: RopeTable, buffers: StepBuffers
    ) -> MicroBatch:
        """With everything but `rows.x`."""
        plan = plan_attention(segments, config.latent_dim, ops, buffers)
        if plan.shape is not None:
            buffers.absorbed(plan.shape[0])  # its memory must not move while calls are noted
        rows = buffers.rows(len(plan.positions))
        rope.fill(plan.positions, rows.cos, rows.sin)
        return cls(buffers, rows, plan)

    def run(self, name: Hashable, work: Callable[[], object]) -> None:
        """Kernel calls over the step's buffers: noted the first time that a batch of this shape makes them."""
        if self.plan.shape is None:
            work()
        else:
            self.buffers.tapes.run((name, self.plan.shape), work)

    def norm(self, ops: Ops, weight: Tensor, eps: float, out: Tensor, has_delta: bool = True) -> Tensor:
        """The norm of the residual stream, with what the last half layer gave."""
        if has_delta:
            return ops.add_rms_norm(self.rows.x, self.rows.delta, weight, eps, out=out)
        return ops.rms_norm(self.rows.x, weight, eps, out=out)


class DecoderLayer:
    """`begin` runs a micro-batch up to where its rows are away at the experts, `finish` takes them in."""

    def __init__(
        self, config: ModelConfig, weights: LayerWeights, layer: int, experts: ExpertBackend, ops: Ops
    ) -> None:
        self._eps = config.rms_norm_eps
        self._weights = weights
        self._ops = ops
        self._layer = layer
        self.attention = LatentAttention(config, weights, ops)
        self.feed_forward = FeedForward(config, weights, layer, experts, ops)

    def begin(self, part: MicroBatch, cache_layer: Tensor, on_layer: OnLayer | None = None) -> None:
        """`on_layer` is told when this batch's latents are in `cache_layer`, if prompts are among them: at once."""
        rows, feed_forward = part.rows, self.feed_forward
        tell = None if part.plan.shape is not None else on_layer
        part.run(("begin", self._layer), lambda: self._attend_and_route(part, cache_layer, tell))
        if on_layer is not None and tell is None:
            on_layer(self._layer)
        part.has_delta = True
        if not feed_forward.is_dense:
            part.handle = feed_forward.dispatch(rows.normed, rows)
            part.run(("shared", self._layer), lambda: feed_forward.run_shared(rows.normed, rows))

    def _attend_and_route(self, part: MicroBatch, cache_layer: Tensor, on_layer: OnLayer | None) -> None:
        rows, weights = part.rows, self._weights
        part.norm(self._ops, weights.input_layernorm, self._eps, rows.normed, part.has_delta)
        self.attention.write_latents(rows.normed, part.plan.slots, cache_layer, rows)
        if on_layer is not None:
            on_layer(self._layer)
        self.attention.attend(part.plan, cache_layer, rows, part.buffers)
        part.norm(self._ops, weights.post_attention_layernorm, self._eps, rows.normed)
        self.feed_forward.mlp_or_route(rows.normed, rows)

    def finish(self, part: MicroBatch) -> None:
        if not self.feed_forward.is_dense:
            self.feed_forward.combine(part.handle, part.rows)
            part.handle = None


class DeepSeekModel:
    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        cache: LatentCache,
        experts: ExpertBackend,
        rope: RopeTable | None = None,
    ) -> None:
        self.config = config
        self.cache = cache
        self.rope = RopeTable(config) if rope is None else rope
        self._weights = weights
        self._experts = experts
        self._ops = weights.ops
        self._buffers: list[StepBuffers] = []
        self.layers = [DecoderLayer(config, layer, i, experts, self._ops) for i, layer in enumerate(weights.layers)]

    @torch.inference_mode()
    def forward(self, batch: Batch, on_layer: OnLayer | None = None, micro_batches: int = 1) -> ForwardOutput:
        """`on_layer(i)` is called when this batch's latents of layer i are in the cache; at once, if prompts are in it.

        With several micro-batches one's rows are at the experts while the next one attends; the bits are the same.
        """
        total = sum(segment.num for segment in batch.segments)
        assert total == len(batch.token_ids), "segments and token_ids count different rows"
        parts, first = [], 0
        for index, segments in enumerate(split_segments(batch.segments, micro_batches)):
            last = first + sum(segment.num for segment in segments)
            parts.append(self._micro_batch(index, batch.token_ids[first:last], segments))
            first = last
        if len(parts) == 1 and isinstance(self._experts, LocalExperts) and self._experts.can_be_noted:
            parts[0].run("layers", lambda: self._run_layers(parts, None if parts[0].plan.shape else on_layer))
            parts[0].has_delta = True
            if on_layer is not None and parts[0].plan.shape is not None:
                for layer in range(len(self.layers)):
                    on_layer(layer)
        else:
            self._run_layers(parts, on_layer)
        return self._output(parts, batch)

    def _run_layers(self, parts: list[MicroBatch], on_layer: OnLayer | None) -> None:
        for i, layer in enumerate(self.layers):
            for part in parts:
                if i:
                    self.layers[i - 1].finish(part)
                layer.begin(part, self.cache.layers[i], on_layer if part is parts[-1] else None)
        for part in parts:
            self.layers[-1].finish(part)

    def _micro_batch(self, index: int, token_ids: Tensor, segments: list[Segment]) -> MicroBatch:
        if index == len(self._buffers):
            self._buffers.append(StepBuffers(self.config, self.cache.dtype, self._ops))
        part = MicroBatch.of(segments, self.config, self._ops, self.rope, self._buffers[index])
        torch.index_select(self._weights.embed_tokens, 0, token_ids, out=part.rows.x)
        return part

    def _output(self, parts: list[MicroBatch], batch: Batch) -> ForwardOutput:
        """Fresh tensors: the next step may run while somebody still reads them."""
        hidden = torch.empty(len(batch.token_ids), self.config.hidden_size, dtype=self.cache.dtype)
        first = 0
        for part in parts:
            last = first + part.rows.x.shape[0]
            part.norm(self._ops, self._weights.norm, self.config.rms_norm_eps, hidden[first:last])
            first = last
        logits = self._ops.wide_linear(hidden.index_select(0, batch.logit_rows), self._weights.lm_head)
        return ForwardOutput(logits, hidden)


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
