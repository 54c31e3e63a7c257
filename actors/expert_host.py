"""Computes the routed experts that one worker holds. Pure: rows in, rows out, no state but the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.network_weights import ExpertWeights


@dataclass(frozen=True, slots=True)
class Slice:
    """One dispatch: x [rows, hidden], row_of_pair [pairs] int64, expert_of_pair [pairs] int64 (logical experts)."""

    x: Tensor
    row_of_pair: Tensor
    expert_of_pair: Tensor


class NotResident(Exception):
    """This worker does not hold some experts it was asked for: send their rows to another replica."""

    def __init__(self, layer: int, experts: Tensor) -> None:
        super().__init__(f"experts {experts.tolist()} of layer {layer} are not resident here")
        self.experts = experts


class ExpertHost:
    """weights: MoE layer -> the experts of that layer which are resident here."""

    def __init__(self, weights: Mapping[int, ExpertWeights], num_experts: int) -> None:
        self._weights = dict(weights)
        self._local: dict[int, Tensor] = {}
        for layer, held in weights.items():
            local = torch.full((num_experts,), -1, dtype=torch.int64)
            local[list(held.expert_ids)] = torch.arange(len(held.expert_ids))
            self._local[layer] = local

    def local_experts(self, layer: int, part: Slice) -> Tensor:
        """Places of the pairs' experts in this worker's weights. Raises NotResident."""
        if layer not in self._local:
            raise NotResident(layer, torch.unique(part.expert_of_pair))
        local = self._local[layer][part.expert_of_pair]
        if len(local) and int(local.min()) < 0:
            raise NotResident(layer, torch.unique(part.expert_of_pair[local < 0]))
        return local

    def run(self, layer: int, parts: list[tuple[Slice, Tensor]]) -> list[Tensor]:
        """Runs the slices of several peers as one batch; parts: (slice, local experts). Returns [pairs, hidden] each.

        Batching changes no bits: grouped_mlp is row-invariant (DESIGN law 5).
        """
        held = self._weights[layer]
        if len(parts) == 1:
            part, local = parts[0]
            return [held.ops.grouped_mlp(part.x, part.row_of_pair, local, held.w13, held.w2)]
        offsets = [0]
        for part, _ in parts:
            offsets.append(offsets[-1] + len(part.x))
        x = torch.cat([part.x for part, _ in parts])
        row_of_pair = torch.cat([part.row_of_pair + offset for (part, _), offset in zip(parts, offsets, strict=False)])
        rows = held.ops.grouped_mlp(x, row_of_pair, torch.cat([local for _, local in parts]), held.w13, held.w2)
        return list(torch.split(rows, [len(local) for _, local in parts]))
