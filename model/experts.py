"""The seam between attention and routed experts: dispatch returns a handle that collect consumes (DESIGN law 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .network_weights import ExpertWeights


class ExpertBackend(Protocol):
    """Where routed experts run. Rows come back one per slot: summing them is the token owner's business."""

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor) -> Any:
        """x: [M, H], topk_idx: int64 [M, k]. Starts the work without blocking; the handle is the backend's own."""
        ...

    def collect(self, handle: Any) -> Tensor:
        """[M, k, H]: row (m, s) is the output of expert topk_idx[m, s] for x[m]."""
        ...


class LocalExperts:
    """All experts of all layers in this process: the colocated mode."""

    def __init__(self, weights: Mapping[int, ExpertWeights]) -> None:
        self._weights = weights
        self._local_index = {layer: _local_index(stack.expert_ids) for layer, stack in weights.items()}

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor) -> Tensor:
        num_tokens, top_k = topk_idx.shape
        stack = self._weights[layer]
        row_of_pair = torch.arange(num_tokens).repeat_interleave(top_k)
        expert_of_pair = self._local_index[layer][topk_idx.reshape(-1)]
        rows = stack.ops.grouped_mlp(x, row_of_pair, expert_of_pair, stack.w13, stack.w2)
        return rows.view(num_tokens, top_k, -1)

    def collect(self, handle: Tensor) -> Tensor:
        return handle


def _local_index(expert_ids: tuple[int, ...]) -> Tensor:
    """Logical expert id -> row of the stack; -1 (which no gather accepts) where absent."""
    table = torch.full((max(expert_ids) + 1,), -1, dtype=torch.int64)
    table[list(expert_ids)] = torch.arange(len(expert_ids))
    return table
