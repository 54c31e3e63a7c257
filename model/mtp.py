"""Multi-token prediction: the module that guesses the token after next (DeepSeek-V3 paper, section 2.2).

For the row at position i it reads `hidden[i]` (the main model's output AFTER `model.norm`, see network_weights.py) and
the embedding of token i+1; its logits are for token i+2. It keeps a latent cache of its own, one layer, under the same
block tables and positions as the main one; position i is written when token i+1 is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import ModelConfig
from .deepseek import DecoderLayer, MicroBatch
from .experts import ExpertBackend
from .kv_cache import LatentCache
from .mla import Segment, plan_attention
from .network_weights import MtpWeights
from .rope import RopeTable
from .step_buffers import StepBuffers


def mtp_cache(config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> LatentCache:
    """The cache of one MTP module."""
    return LatentCache(config, num_blocks, dtype, num_layers=1)


class MtpModule:
    """Module number `depth`; its routed experts are those of layer num_hidden_layers + depth."""

    def __init__(
        self,
        config: ModelConfig,
        weights: MtpWeights,
        cache: LatentCache,
        experts: ExpertBackend,
        rope: RopeTable,
        depth: int = 0,
    ) -> None:
        self.config = config
        self.cache = cache
        self._weights = weights
        self._rope = rope
        self._ops = weights.ops
        self._buffers = StepBuffers(config, cache.dtype)
        self._layer = DecoderLayer(config, weights.layer, config.num_hidden_layers + depth, experts, weights.ops)

    @torch.inference_mode()
    def draft(self, hidden: Tensor, next_ids: Tensor, segments: Sequence[Segment], logit_rows: Tensor) -> Tensor:
        """hidden: [N, H] of the segments' positions, next_ids: int64 [N], the token after each -> fp32 [R, vocab]."""
        plan = plan_attention(segments, self.config.latent_dim, self._ops)
        assert len(plan.positions) == len(next_ids) == len(hidden), "segments, next_ids and hidden count different rows"
        ops, weights, eps = self._ops, self._weights, self.config.rms_norm_eps
        rows = self._buffers.rows(len(hidden))
        embedded = ops.rms_norm(weights.embed_tokens[next_ids], weights.enorm, eps)
        pair = torch.cat((embedded, ops.rms_norm(hidden, weights.hnorm, eps)), dim=-1)
        ops.linear(pair, weights.eh_proj, out=rows.x)
        part = MicroBatch(self._buffers, rows, plan, *self._rope(plan.positions))
        self._layer.begin(part, self.cache, 0)
        self._layer.finish(part)
        wanted = part.norm(ops, weights.shared_head_norm, eps, rows.normed)[logit_rows]
        return ops.wide_linear(wanted, weights.shared_head)
