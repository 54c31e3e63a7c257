"""The shared expert runs while the routed ones are away, and the owner combines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import small_model
from torch import Tensor

from braid.kernels.reference import combine, swiglu_mlp
from braid.model.experts import LocalExperts
from braid.model.moe import FeedForward
from braid.model.step_buffers import StepBuffers, StepRows
from braid.model.torch_ops import TorchOps


class Watched:
    """Local experts that note when they are called."""

    can_be_noted = False

    def __init__(self, inner: LocalExperts, log: list[str]) -> None:
        self.inner, self.log = inner, log

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor, first_row: int = 0) -> Any:
        self.log.append(f"dispatch {layer}")
        return self.inner.dispatch(layer, x, topk_idx, first_row)

    def collect(self, handle: Any) -> Tensor:
        self.log.append("collect")
        rows: Tensor = self.inner.collect(handle)
        return rows


@dataclass(frozen=True)
class WatchedOps(TorchOps):
    """Notes when the shared expert runs."""

    log: list[str] = field(default_factory=list)

    def swiglu_mlp(self, x: Tensor, w13: Tensor, w2: Tensor, out: Tensor | None = None) -> Tensor:
        self.log.append("shared")
        return TorchOps.swiglu_mlp(self, x, w13, w2, out)


def step_rows(num: int) -> StepRows:
    return StepBuffers(small_model("v3").config, torch.float32, TorchOps()).rows(num)


def forward(layer: FeedForward, x: Tensor) -> Tensor:
    rows = step_rows(len(x))
    layer.mlp_or_route(x, rows)
    if layer.is_dense:
        return rows.delta
    handle = layer.dispatch(x, rows)
    layer.run_shared(x, rows)
    return layer.combine(handle, rows)


def test_shared_expert_runs_between_dispatch_and_collect() -> None:
    small = small_model("v3")
    log: list[str] = []
    experts = Watched(LocalExperts(small.experts), log)
    layer = FeedForward(small.config, small.weights.layers[1], 1, experts, WatchedOps(log=log))
    forward(layer, torch.randn(3, small.config.hidden_size))
    assert log == ["dispatch 1", "shared", "collect"]


def test_output_is_the_combine_of_the_slots() -> None:
    small = small_model("v3")
    experts, weights = LocalExperts(small.experts), small.weights.layers[2]
    layer, x = FeedForward(small.config, weights, 2, experts, TorchOps()), torch.randn(7, small.config.hidden_size)
    topk_idx, topk_weights = layer.route(x, step_rows(7))
    assert weights.shared is not None
    shared = swiglu_mlp(x, weights.shared.w13, weights.shared.w2)
    slots = experts.collect(experts.dispatch(2, x, topk_idx)).clone()
    assert torch.equal(forward(layer, x), combine(shared, slots, topk_weights))


def test_a_dense_layer_asks_no_expert() -> None:
    small = small_model("v3")
    log: list[str] = []
    weights = small.weights.layers[0]
    x = torch.randn(2, small.config.hidden_size)
    layer = FeedForward(small.config, weights, 0, Watched(LocalExperts(small.experts), log), TorchOps())
    assert weights.mlp is not None
    assert torch.equal(forward(layer, x), swiglu_mlp(x, weights.mlp.w13, weights.mlp.w2))
    assert log == []
