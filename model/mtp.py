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
from .step_buffers import StepBuffers, WantedRows
from .to_device import on_device


@dataclass(frozen=True, slots=True)
class Drafted:
    """Of the rows asked for, until the next pass overwrites them. logits: fp32 [R, vocab]; hidden: [R, H] after the
    head's norm, to draft on from."""

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
        self._experts = experts

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
        pair, wanted = self._buffers.pair(len(hidden)), self._buffers.wanted(len(logit_rows))
        part = MicroBatch.of(segments, self.config, self._ops, self._rope, self._buffers)
        rows = part.rows
        assert len(rows.x) == len(next_ids) == len(hidden), "segments, next_ids and hidden count different rows"
        next_ids = on_device(next_ids, self._ops.device)
        rows.delta.copy_(hidden)
        wanted.rows.copy_(on_device(logit_rows, self._ops.device))
        self._ops.gather(self._weights.embed_tokens, next_ids, rows.shared)
        if self._experts.can_be_noted and part.plan.shape is not None:
            part.run(("module", len(logit_rows)), lambda: self._run(part, pair, wanted, None))
            if on_layer is not None:
                on_layer(self.config.num_hidden_layers)
        else:
            self._run(part, pair, wanted, on_layer)
        return Drafted(wanted.logits, wanted.hidden)

    def _run(self, part: MicroBatch, pair: Tensor, wanted: WantedRows, on_layer: OnLayer | None) -> None:
        """From the embedded tokens in `rows.shared` and the hidden rows in `rows.delta` to the logits."""
        part.turn(self._ops)
        part.has_delta = False
        part.run("join", lambda: self._join(part, pair))
        self._layer.begin(part, self.cache.layers[self.config.num_hidden_layers], on_layer)
        self._layer.finish(part)
        part.run(("head", len(wanted.rows)), lambda: self._read(part, wanted))

    def _read(self, part: MicroBatch, wanted: WantedRows) -> None:
        ops, weights = self._ops, self._weights
        part.norm(ops, weights.shared_head_norm, self.config.rms_norm_eps, part.rows.shared)
        ops.gather(part.rows.shared, wanted.rows, wanted.hidden)
        ops.wide_linear(wanted.hidden, weights.shared_head, out=wanted.logits)

    def _join(self, part: MicroBatch, pair: Tensor) -> None:
        ops, weights, rows, eps = self._ops, self._weights, part.rows, self.config.rms_norm_eps
        hidden_size = self.config.hidden_size
        ops.rms_norm(rows.shared, weights.enorm, eps, out=pair[:, :hidden_size])
        ops.rms_norm(rows.delta, weights.hnorm, eps, out=pair[:, hidden_size:])
        ops.linear(pair, weights.eh_proj, out=rows.x)
