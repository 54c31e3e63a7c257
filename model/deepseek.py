"""The DeepSeek-V2/V3 network over a paged latent cache: one batch of rows in, logits of the wanted rows out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .experts import ExpertBackend
from .kv_cache import LatentCache
from .mla import AttentionPlan, LatentAttention, Segment, plan_attention
from .moe import FeedForward, OpenMoe
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
    cos: Tensor
    sin: Tensor
    has_delta: bool = False
    opened: OpenMoe | None = None

    def norm(self, ops: Ops, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """The norm of the residual stream, with what the last half layer gave."""
        if self.has_delta:
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
        self.attention = LatentAttention(config, weights, ops)
        self.feed_forward = FeedForward(config, weights, layer, experts, ops)

    def begin(self, part: MicroBatch, cache: LatentCache, cache_layer: int, on_layer: OnLayer | None = None) -> None:
        """`on_layer` is told as soon as this batch's latents of `cache_layer` are written."""
        rows, latents = part.rows, cache.layers[cache_layer]
        normed = part.norm(self._ops, self._weights.input_layernorm, self._eps, rows.normed)
        self.attention.write_latents(normed, part.cos, part.sin, part.plan.slots, latents, rows)
        if on_layer is not None:
            on_layer(cache_layer)
        self.attention.attend(part.cos, part.sin, part.plan, latents, rows, part.buffers)
        part.has_delta = True
        normed = part.norm(self._ops, self._weights.post_attention_layernorm, self._eps, rows.normed)
        part.opened = self.feed_forward.begin(normed, rows)

    def finish(self, part: MicroBatch) -> None:
        self.feed_forward.finish(part.opened, part.rows)
        part.opened = None


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
        self._ops = weights.ops
        self._buffers: list[StepBuffers] = []
        self.layers = [DecoderLayer(config, layer, i, experts, self._ops) for i, layer in enumerate(weights.layers)]

    @torch.inference_mode()
    def forward(self, batch: Batch, on_layer: OnLayer | None = None, micro_batches: int = 1) -> ForwardOutput:
        """`on_layer(i)` is called when this batch's latents of layer i are in the cache.

        With several micro-batches one's rows are at the experts while the next one attends; the bits are the same.
        """
        total = sum(segment.num for segment in batch.segments)
        assert total == len(batch.token_ids), "segments and token_ids count different rows"
        parts, first = [], 0
        for index, segments in enumerate(split_segments(batch.segments, micro_batches)):
            last = first + sum(segment.num for segment in segments)
            parts.append(self._micro_batch(index, batch.token_ids[first:last], segments))
            first = last
        for i, layer in enumerate(self.layers):
            for part in parts:
                if i:
                    self.layers[i - 1].finish(part)
                layer.begin(part, self.cache, i, on_layer if part is parts[-1] else None)
        for part in parts:
            self.layers[-1].finish(part)
        return self._output(parts, batch)

    def _micro_batch(self, index: int, token_ids: Tensor, segments: list[Segment]) -> MicroBatch:
        if index == len(self._buffers):
            self._buffers.append(StepBuffers(self.config, self.cache.dtype))
        buffers = self._buffers[index]
        plan = plan_attention(segments, self.config.latent_dim, self._ops)
        rows = buffers.rows(len(token_ids))
        torch.index_select(self._weights.embed_tokens, 0, token_ids, out=rows.x)
        return MicroBatch(buffers, rows, plan, *self.rope(plan.positions))

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
