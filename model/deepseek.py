"""The DeepSeek-V2/V3 network over a paged latent cache: one batch of rows in, logits of the wanted rows out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .experts import ExpertBackend
from .kv_cache import LatentCache
from .micro_batch import MicroBatch, pick_segments, split_segments
from .mla import LatentAttention, Segment
from .moe import FeedForward
from .network_weights import AttentionWeights, LayerWeights
from .ops import Ops
from .rope import RopeTable
from .step_buffers import StepBuffers
from .to_device import on_device

__all__ = ["Batch", "DecoderLayer", "DeepSeekModel", "ForwardOutput", "Segment"]

OnLayer = Callable[[int], None]


@dataclass(slots=True)
class Batch:
    """Rows of all segments, one after the other. `logit_rows`: int64, the rows whose logits are wanted, ascending.
    Both tensors in host memory.

    `wants_hidden`: whether the hidden rows of the others are too; else they may end with the last layer's latents.
    """

    token_ids: Tensor
    segments: list[Segment]
    logit_rows: Tensor
    wants_hidden: bool = True


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """On the model's device. logits: fp32 [R, vocab] of `logit_rows`; hidden, after the final norm (what MTP reads):
    [N, H], every row, or [R, H] where no others were wanted."""

    logits: Tensor
    hidden: Tensor


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
            part.handle = feed_forward.dispatch(rows.normed, rows, part.first_row)
            part.run(("shared", self._layer), lambda: feed_forward.run_shared(rows.normed, rows))

    def write_latents(self, part: MicroBatch, cache_layer: Tensor, on_layer: OnLayer | None = None) -> None:
        """The first thing that `begin` does; all of it where nobody asks for what the layer makes of the rows."""
        part.norm(self._ops, self._weights.input_layernorm, self._eps, part.rows.normed, part.has_delta)
        self.attention.write_latents(part.rows.normed, part.plan.slots, cache_layer, part.rows)
        if on_layer is not None:
            on_layer(self._layer)

    def _attend_and_route(self, part: MicroBatch, cache_layer: Tensor, on_layer: OnLayer | None) -> None:
        rows = part.rows
        self.write_latents(part, cache_layer, on_layer)
        self.attention.attend(part.plan, cache_layer, rows, part.buffers)
        part.norm(self._ops, self._weights.post_attention_layernorm, self._eps, rows.normed)
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
        self.rope = RopeTable(config, device=weights.ops.device) if rope is None else rope
        self._weights = weights
        self._experts = experts
        self._ops = weights.ops
        self._buffers: list[StepBuffers] = []
        self._picked_buffers: StepBuffers | None = None
        self.layers = [DecoderLayer(config, layer, i, experts, self._ops) for i, layer in enumerate(weights.layers)]

    @torch.inference_mode()
    def forward(self, batch: Batch, on_layer: OnLayer | None = None, micro_batches: int = 1) -> ForwardOutput:
        """`on_layer(i)` is called when this batch's latents of layer i are in the cache; at once, if prompts are in it.

        With several micro-batches one's rows are at the experts while the next one attends; the bits are the same.
        """
        total = sum(segment.num for segment in batch.segments)
        assert total == len(batch.token_ids), "segments and token_ids count different rows"
        if self._experts.can_be_noted:
            part = self._run_local(batch, on_layer)
            return self._output([part], part.rows.x.shape[0], batch)
        parts, first = [], 0
        for index, segments in enumerate(split_segments(batch.segments, micro_batches)):
            parts.append(self._micro_batch(index, batch.token_ids, segments, first))
            first += parts[-1].rows.x.shape[0]
        self._run_layers(parts, on_layer)
        return self._output(parts, total, batch)

    def _run_local(self, batch: Batch, on_layer: OnLayer | None) -> MicroBatch:
        """Nobody is waited for: one part, whose kernel calls are played as a whole, or whose idle rows end early."""
        part = self._micro_batch(0, batch.token_ids, batch.segments, 0)
        if part.plan.shape is None and not batch.wants_hidden:
            return self._run_until_picked(part, batch, on_layer)
        is_noted = part.plan.shape is not None
        part.run("layers", lambda: self._run_layers([part], None if is_noted else on_layer))
        part.has_delta = True  # where nothing ran but what was noted
        if on_layer is not None and is_noted:
            for layer in range(len(self.layers)):
                on_layer(layer)
        return part

    def _run_until_picked(self, part: MicroBatch, batch: Batch, on_layer: OnLayer | None) -> MicroBatch:
        """All rows up to the last layer's latents, then that layer for the wanted rows only."""
        *first_layers, last = self.layers
        part.turn(self._ops)
        latents = self.cache.layers[len(first_layers)]
        for i, layer in enumerate(first_layers):
            layer.begin(part, self.cache.layers[i], on_layer)
            layer.finish(part)
        last.write_latents(part, latents, on_layer)
        rows = batch.logit_rows
        segments = pick_segments(batch.segments, rows.tolist())
        if self._picked_buffers is None:
            self._picked_buffers = StepBuffers(self.config, self.cache.dtype, self._ops)
        picked = MicroBatch.of(segments, self.config, self._ops, self.rope, self._picked_buffers)
        # the norm above has added delta
        torch.index_select(part.rows.x, 0, on_device(rows, self._ops.device), out=picked.rows.x)
        if segments:
            picked.turn(self._ops)
            last.begin(picked, latents)
            last.finish(picked)
        return picked

    def _run_layers(self, parts: list[MicroBatch], on_layer: OnLayer | None) -> None:
        for part in parts:
            part.turn(self._ops)
            part.has_delta = False
        for i, layer in enumerate(self.layers):
            for part in parts:
                if i:
                    self.layers[i - 1].finish(part)
                layer.begin(part, self.cache.layers[i], on_layer if part is parts[-1] else None)
        for part in parts:
            self.layers[-1].finish(part)

    def _micro_batch(self, index: int, token_ids: Tensor, segments: list[Segment], first_row: int) -> MicroBatch:
        if index == len(self._buffers):
            self._buffers.append(StepBuffers(self.config, self.cache.dtype, self._ops))
        part = MicroBatch.of(segments, self.config, self._ops, self.rope, self._buffers[index], first_row)
        num_rows = part.rows.x.shape[0]
        own_ids = token_ids if num_rows == len(token_ids) else token_ids[first_row : first_row + num_rows]
        self._ops.gather(self._weights.embed_tokens, on_device(own_ids, self._ops.device), part.rows.x)
        return part

    def _output(self, parts: list[MicroBatch], num_rows: int, batch: Batch) -> ForwardOutput:
        """Fresh tensors: the next step may run while somebody still reads them."""
        device = self._ops.device
        hidden = torch.empty(num_rows, self.config.hidden_size, dtype=self.cache.dtype, device=device)
        for part in parts:
            own = hidden if len(parts) == 1 else hidden[part.first_row : part.first_row + part.rows.x.shape[0]]
            part.norm(self._ops, self._weights.norm, self.config.rms_norm_eps, own)
        wanted = hidden
        if num_rows == len(batch.token_ids) > len(batch.logit_rows):
            wanted = hidden.index_select(0, on_device(batch.logit_rows, device))
        return ForwardOutput(self._ops.wide_linear(wanted, self._weights.lm_head), hidden)
