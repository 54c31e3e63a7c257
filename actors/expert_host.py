"""Computes the routed experts that one worker holds. Pure: rows in, rows out, no state but the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
        self._local: dict[int, npt.NDArray[np.int64]] = {}
        for layer, held in weights.items():
            self._local[layer] = local = np.full(num_experts, -1)
            local[list(held.expert_ids)] = np.arange(len(held.expert_ids))

    def local_experts(self, layer: int, part: Slice) -> Tensor:
        """Places of the pairs' experts in this worker's weights. Raises NotResident."""
        if layer not in self._local:
            raise NotResident(layer, torch.unique(part.expert_of_pair))
        local = self._local[layer][part.expert_of_pair.numpy()]
        if len(local) and local.min() < 0:
            raise NotResident(layer, torch.unique(part.expert_of_pair[torch.from_numpy(local < 0)]))
        return torch.from_numpy(local)

    def run(self, layer: int, parts: list[tuple[Slice, Tensor]], out: Tensor) -> None:
        """Runs the slices of several peers as one batch; parts: (slice, local experts), out: [pairs of all, hidden].

        Batching changes no bits: grouped_mlp is row-invariant (DESIGN law 5).
        """
        held = self._weights[layer]
        (part, local), *others = parts
        x, row_of_pair = part.x, part.row_of_pair
        if others:
            offsets = np.cumsum([0, *(len(part.x) for part, _ in parts)]).tolist()
            x = torch.cat([part.x for part, _ in parts])
            row_of_pair = torch.cat(
                [part.row_of_pair + first for (part, _), first in zip(parts, offsets, strict=False)]
            )
            local = torch.cat([local for _, local in parts])
        held.ops.grouped_mlp(x, row_of_pair, local, held.w13, held.w2, out=out)
