"""The feed-forward half of a layer: a dense MLP, or gate, dispatch, shared expert while waiting, and combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .config import ModelConfig
from .experts import ExpertBackend
from .network_weights import LayerWeights
from .ops import Ops
from .step_buffers import StepRows


@dataclass(frozen=True, slots=True)
class OpenMoe:
    """Between `begin` and `finish`: rows are away at the routed experts."""

    handle: Any
    shared: Tensor | None
    topk_weights: Tensor


class FeedForward:
    def __init__(
        self, config: ModelConfig, weights: LayerWeights, layer: int, experts: ExpertBackend, ops: Ops
    ) -> None:
        self._config = config
        self._weights = weights
        self._layer = layer
        self._experts = experts
        self._ops = ops

    def begin(self, x: Tensor, rows: StepRows) -> OpenMoe | None:
        """x: [N, H] normed, left alone until `finish`. None where the layer is dense: then `rows.delta` is done."""
        mlp = self._weights.mlp
        if mlp is not None:
            self._ops.swiglu_mlp(x, mlp.w13, mlp.w2, out=rows.delta)
            return None
        topk_idx, topk_weights = self.route(x, rows)
        handle = self._experts.dispatch(self._layer, x, topk_idx)
        shared = self._weights.shared
        if shared is None:
            return OpenMoe(handle, None, topk_weights)
        return OpenMoe(handle, self._ops.swiglu_mlp(x, shared.w13, shared.w2, out=rows.shared), topk_weights)

    def finish(self, opened: OpenMoe | None, rows: StepRows) -> Tensor:
        """[N, H], in `rows.delta`."""
        if opened is None:
            return rows.delta
        slots = self._experts.collect(opened.handle)
        return self._ops.combine(opened.shared, slots, opened.topk_weights, out=rows.delta)

    def route(self, x: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
        """topk_idx int64 [N, k], topk_weights fp32 [N, k]; logits in fp32 whatever the model's dtype."""
        weights = self._weights
        assert weights.gate_weight is not None, f"layer {self._layer} has no gate"
        logits = self._ops.wide_linear(x, weights.gate_weight, out=rows.gate)
        return self._ops.route(logits, weights.e_score_correction_bias, self._config)
