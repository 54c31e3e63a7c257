"""The seam between attention and routed experts: dispatch returns a handle that collect consumes (DESIGN law 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        """[M, k, H]: row (m, s) is the output of expert topk_idx[m, s] for x[m]. Valid until the next dispatch."""
        ...


@dataclass(frozen=True, slots=True)
class LocalHandle:
    memory: Tensor
    rows: Tensor  # [M, k, H], its front


class LocalExperts:
    """All experts of all layers in this process: the colocated mode."""

    def __init__(self, weights: Mapping[int, ExpertWeights]) -> None:
        self._weights = weights
        self._places = {layer: _places(stack.expert_ids) for layer, stack in weights.items()}
        self._row_of_pair = torch.empty(0, dtype=torch.int64)
        self._top_k = 0
        self._spare: list[Tensor] = []  # memory for rows, [pairs, H] each

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor) -> LocalHandle:
        num_tokens, top_k = topk_idx.shape
        num_pairs = num_tokens * top_k
        stack, places = self._weights[layer], self._places[layer]
        expert_of_pair = topk_idx.reshape(-1)
        if places is not None:
            expert_of_pair = places[expert_of_pair]
        memory = self._spare.pop() if self._spare else x.new_empty(0, x.shape[1])
        if len(memory) < num_pairs:
            memory = x.new_empty(num_pairs, x.shape[1])
        rows = memory[:num_pairs]
        stack.ops.grouped_mlp(x, self._rows_of_pairs(num_tokens, top_k), expert_of_pair, stack.w13, stack.w2, out=rows)
        return LocalHandle(memory, rows.view(num_tokens, top_k, -1))

    def collect(self, handle: LocalHandle) -> Tensor:
        self._spare.append(handle.memory)
        return handle.rows

    def _rows_of_pairs(self, num_tokens: int, top_k: int) -> Tensor:
        """0 0 .. 1 1 ..: `top_k` times each."""
        if len(self._row_of_pair) < num_tokens * top_k or top_k != self._top_k:
            self._row_of_pair, self._top_k = torch.arange(num_tokens).repeat_interleave(top_k), top_k
        return self._row_of_pair[: num_tokens * top_k]


def _places(expert_ids: tuple[int, ...]) -> Tensor | None:
    """Logical expert id -> row of the stack, -1 (which no gather accepts) where absent; None where they are equal."""
    if expert_ids == tuple(range(len(expert_ids))):
        return None
    table = torch.full((max(expert_ids) + 1,), -1, dtype=torch.int64)
    table[list(expert_ids)] = torch.arange(len(expert_ids))
    return table
