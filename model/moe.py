"""The feed-forward half of a layer: a dense MLP, or gate, dispatch, shared expert while waiting, and combine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import ModelConfig
from .experts import ExpertBackend
from .network_weights import LayerWeights
from .ops import Operand, Ops
from .step_buffers import StepRows


class FeedForward:
    def __init__(
        self, config: ModelConfig, weights: LayerWeights, layer: int, experts: ExpertBackend, ops: Ops
    ) -> None:
        self._config = config
        self._weights = weights
        self._layer = layer
        self._experts = experts
        self._ops = ops

    @property
    def is_dense(self) -> bool:
        return self._weights.mlp is not None

    def mlp_or_route(self, x: Operand, rows: StepRows) -> None:
        """x: [N, H] normed. The dense MLP's rows into `rows.delta`, or the chosen experts into `rows`."""
        mlp = self._weights.mlp
        if mlp is None:
            self.route(x, rows)
        else:
            self._ops.swiglu_mlp(x, mlp.w13, mlp.w2, out=rows.delta)

    def dispatch(self, x: Operand, rows: StepRows, first_row: int = 0) -> Any:
        """Follows `mlp_or_route` of a MoE layer. x is left alone until the handle has been collected."""
        return self._experts.dispatch(self._layer, x, rows.topk_idx, first_row)

    def run_shared(self, x: Operand, rows: StepRows) -> None:
        shared = self._weights.shared
        if shared is not None:
            self._ops.swiglu_mlp(x, shared.w13, shared.w2, out=rows.shared)

    def combine(self, handle: Any, rows: StepRows) -> Tensor:
        """[N, H], in `rows.delta`."""
        shared = rows.shared if self._weights.shared is not None else None
        return self._ops.combine(shared, self._experts.collect(handle), rows.topk_weights, out=rows.delta)

    def route(self, x: Operand, rows: StepRows) -> tuple[Tensor, Tensor]:
        """topk_idx int64 [N, k], topk_weights fp32 [N, k]; logits in fp32 whatever the model's dtype."""
        weights = self._weights
        assert weights.gate_weight is not None, f"layer {self._layer} has no gate"
        logits = self._ops.wide_linear(x, weights.gate_weight, out=rows.gate)
        chosen = rows.topk_idx, rows.topk_weights
        return self._ops.route(logits, weights.e_score_correction_bias, self._config, out=chosen)
