"""The feed-forward half of a layer: a dense MLP, or gate, dispatch, shared expert while waiting, and combine."""

from __future__ import annotations

from torch import Tensor

from ..kernels.reference import combine, linear, swiglu_mlp
from ..router.gate import route
from .config import ModelConfig
from .experts import ExpertBackend
from .network_weights import LayerWeights


class FeedForward:
    def __init__(self, config: ModelConfig, weights: LayerWeights, layer: int, experts: ExpertBackend) -> None:
        self._config = config
        self._weights = weights
        self._layer = layer
        self._experts = experts

    def __call__(self, x: Tensor) -> Tensor:
        """x: [N, H] normed -> [N, H]."""
        mlp = self._weights.mlp
        return self._moe(x) if mlp is None else swiglu_mlp(x, mlp.w13, mlp.w2)

    def _moe(self, x: Tensor) -> Tensor:
        topk_idx, topk_weights = self.route(x)
        handle = self._experts.dispatch(self._layer, x, topk_idx)
        shared = self._weights.shared
        shared_rows = None if shared is None else swiglu_mlp(x, shared.w13, shared.w2)
        return combine(shared_rows, self._experts.collect(handle), topk_weights)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_idx int64 [N, k], topk_weights fp32 [N, k]; logits in fp32 whatever the model's dtype."""
        config, weights = self._config, self._weights
        assert weights.gate_weight is not None, f"layer {self._layer} has no gate"
        return route(
            linear(x.float(), weights.gate_weight),
            weights.e_score_correction_bias,
            config.scoring_func,
            config.topk_method,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
