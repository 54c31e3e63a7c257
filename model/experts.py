"""The seam between attention and routed experts: dispatch returns a handle that collect consumes (DESIGN law 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .network_weights import ExpertWeights
from .ops import Operand
from .row_memory import RowMemory


class ExpertBackend(Protocol):
    """Where routed experts run. Rows come back one per slot: summing them is the token owner's business."""

    @property
    def can_be_noted(self) -> bool:
        """Whether dispatch and collect now make kernel calls only, over memory that stays where it is."""
        ...

    def dispatch(self, layer: int, x: Operand, topk_idx: Tensor, first_row: int = 0) -> Any:
        """x: [M, H], topk_idx: int64 [M, k]. Starts the work without blocking; the handle is the backend's own.

        `first_row`: where x[0] stands in the batch, of which x may be a part. The rows themselves: `Ops.tensor(x)`.
        """
        ...

    def collect(self, handle: Any) -> Tensor:
        """[M, k, H]: row (m, s) is the output of expert topk_idx[m, s] for x[m]. Valid until the next dispatch."""
        ...


@dataclass(frozen=True, slots=True)
class LocalHandle:
    memory: Tensor
    rows: Tensor  # [M, k, H], its front


class LocalExperts:
    """All experts of all layers in this process: the colocated mode. See ExpertBackend for the shapes."""

    def __init__(self, weights: Mapping[int, ExpertWeights]) -> None:
        self._weights = weights
        self._places = {layer: _places(stack.expert_ids, stack.ops.device) for layer, stack in weights.items()}
        self.can_be_noted = all(places is None for places in self._places.values())
        self._rows_of_pairs: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        self._top_k = 0
        self._memory = RowMemory()

    def dispatch(self, layer: int, x: Operand, topk_idx: Tensor, first_row: int = 0) -> LocalHandle:
        num_tokens, top_k = topk_idx.shape
        num_pairs = num_tokens * top_k
        stack, places = self._weights[layer], self._places[layer]
        expert_of_pair = topk_idx.reshape(-1)
        if places is not None:
            expert_of_pair = places[expert_of_pair]
        memory = self._memory.take(num_pairs, stack.ops.tensor(x))
        rows, row_of_pair = memory[:num_pairs], self._row_of_pair(num_tokens, top_k, topk_idx.device)
        stack.ops.grouped_mlp(x, row_of_pair, expert_of_pair, stack.w13, stack.w2, out=rows)
        return LocalHandle(memory, rows.view(num_tokens, top_k, -1))

    def collect(self, handle: LocalHandle) -> Tensor:
        """[M, k, H], valid until the next dispatch."""
        self._memory.give_back(handle.memory)
        return handle.rows

    def _row_of_pair(self, num_tokens: int, top_k: int, device: torch.device) -> Tensor:
        """0 0 .. 1 1 ..: `top_k` times each."""
        num_pairs = num_tokens * top_k
        if len(self._rows_of_pairs[-1]) < num_pairs or top_k != self._top_k:
            num_tokens = max(num_tokens, 2 * len(self._rows_of_pairs[-1]) // top_k)
            self._rows_of_pairs.append(torch.arange(num_tokens).repeat_interleave(top_k).to(device))
            self._top_k = top_k
        return self._rows_of_pairs[-1][:num_pairs]


def _places(expert_ids: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Logical expert id -> row of the stack, -1 (which no gather accepts) where absent; None where they are equal."""
    if expert_ids == tuple(range(len(expert_ids))):
        return None
    table = torch.full((max(expert_ids) + 1,), -1, dtype=torch.int64)
    table[list(expert_ids)] = torch.arange(len(expert_ids))
    return table.to(device)
