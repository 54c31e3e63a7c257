"""The DeepSeek-V2/V3 network over a paged latent cache: one batch of rows in, logits of the wanted rows out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import linear, rms_norm
from .config import ModelConfig
from .experts import ExpertBackend
from .kv_cache import LatentCache
from .mla import AttentionPlan, LatentAttention, Segment, plan_attention
from .moe import FeedForward
from .network_weights import AttentionWeights, LayerWeights
from .rope import RopeTable

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


class DecoderLayer:
    def __init__(self, config: ModelConfig, weights: LayerWeights, layer: int, experts: ExpertBackend) -> None:
        self._eps = config.rms_norm_eps
        self._weights = weights
        self.attention = LatentAttention(config, weights)
        self.feed_forward = FeedForward(config, weights, layer, experts)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: AttentionPlan,
        cache: LatentCache,
        cache_layer: int,
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """x: [N, H] -> [N, H]. `on_layer` is told as soon as this batch's latents of `cache_layer` are written."""
        normed = rms_norm(x, self._weights.input_layernorm, self._eps)
        self.attention.write_latents(normed, cos, sin, plan.slots, cache, cache_layer)
        if on_layer is not None:
            on_layer(cache_layer)
        x = x + self.attention.attend(normed, cos, sin, plan, cache.layers[cache_layer])
        return x + self.feed_forward(rms_norm(x, self._weights.post_attention_layernorm, self._eps))


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
        self.layers = [DecoderLayer(config, layer, i, experts) for i, layer in enumerate(weights.layers)]

    @torch.inference_mode()
    def forward(self, batch: Batch, on_layer: OnLayer | None = None) -> ForwardOutput:
        """`on_layer(i)` is called when this batch's latents of layer i are in the cache, before layer i attends."""
        plan = plan_attention(batch.segments, self.config.latent_dim)
        assert len(plan.positions) == len(batch.token_ids), "segments and token_ids count different rows"
        cos, sin = self.rope(plan.positions)
        x = self._weights.embed_tokens[batch.token_ids]
        for i, layer in enumerate(self.layers):
            x = layer.forward(x, cos, sin, plan, self.cache, i, on_layer)
        hidden = rms_norm(x, self._weights.norm, self.config.rms_norm_eps)
        return ForwardOutput(linear(hidden[batch.logit_rows], self._weights.lm_head).float(), hidden)
