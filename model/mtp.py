"""Multi-token prediction: the module that guesses the token after next (DeepSeek-V3 paper, section 2.2).

For the row at position i it reads `hidden[i]` (the main model's output AFTER `model.norm`, see network_weights.py) and
the embedding of token i+1; its logits are for token i+2. Its latents are one more layer of the main model's cache,
under the same block tables and positions; position i is written when token i+1 is known. To guess one token further it
reads its own output for row i in place of the hidden row i+1 that nobody has computed yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .deepseek import DecoderLayer, OnLayer
from .experts import ExpertBackend
from .kv_cache import LatentCache
from .micro_batch import MicroBatch
from .mla import Segment
from .network_weights import MtpWeights
from .rope import RopeTable
from .step_buffers import StepBuffers


@dataclass(frozen=True, slots=True)
class Drafted:
    """Of the rows asked for. logits: fp32 [R, vocab]; hidden: [R, H] after the head's norm, to draft on from."""

    logits: Tensor
    hidden: Tensor


class MtpModule:
    """A checkpoint's first module: layer num_hidden_layers, of the cache and of the routed experts."""

    def __init__(
        self,
        config: ModelConfig,
        weights: MtpWeights,
        cache: LatentCache,
        experts: ExpertBackend,
        rope: RopeTable,
    ) -> None:
        self.config = config
        self.cache = cache
        self._weights = weights
        self._rope = rope
        self._ops = weights.ops
        self._buffers = StepBuffers(config, cache.dtype, weights.ops)
        self._layer = DecoderLayer(config, weights.layer, config.num_hidden_layers, experts, weights.ops)

    @torch.inference_mode()
    def draft(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        segments: Sequence[Segment],
        logit_rows: Tensor,
        on_layer: OnLayer | None = None,
    ) -> Drafted:
        """hidden: [N, H] of the segments' positions, next_ids: int64 [N], the token after each, logit_rows: int64 [R].

        `on_layer` is called with this layer's number when its latents are in the cache.
        """
        part = MicroBatch.of(segments, self.config, self._ops, self._rope, self._buffers)
        assert len(part.rows.x) == len(next_ids) == len(hidden), "segments, next_ids and hidden count different rows"
        ops, weights, eps = self._ops, self._weights, self.config.rms_norm_eps
        embedded = ops.rms_norm(weights.embed_tokens[next_ids], weights.enorm, eps)
        pair = torch.cat((embedded, ops.rms_norm(hidden, weights.hnorm, eps)), dim=-1)
        ops.linear(pair, weights.eh_proj, out=part.rows.x)
        self._layer.begin(part, self.cache.layers[self.config.num_hidden_layers], on_layer)
        self._layer.finish(part)
        wanted = part.norm(ops, weights.shared_head_norm, eps, part.rows.normed)[logit_rows]
        return Drafted(ops.wide_linear(wanted, weights.shared_head), wanted)
