"""Computes the routed experts that one worker holds. Pure: rows in, rows out, no state but the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.network_weights import ExpertWeights
from .pairs import Ints, decode, experts_of


@dataclass(slots=True)
class Slice:
    """One dispatch: x [rows, hidden], and the payload that begins with its pairs of a row and a logical expert."""

    x: Tensor
    payload: memoryview
    num_pairs: int


class ExpertHost:
    """weights: MoE layer -> the experts of that layer which are resident here."""

    def __init__(self, weights: Mapping[int, ExpertWeights], num_experts: int) -> None:
        self._weights = dict(weights)
        self._nowhere = np.full(num_experts, -1)
        self.places_of = np.full((max(weights, default=-1) + 1, num_experts), -1)  # by layer and expert: in the stack
        for layer, held in weights.items():
            self.places_of[layer, list(held.expert_ids)] = np.arange(len(held.expert_ids))
        self._rows = self._places = np.zeros(0, dtype=np.int64)  # of the pairs of a batch: row of x, place in the stack

    def add(self, layer: int, part: Slice, num_rows: int, num_pairs: int) -> bool:
        """Puts a slice into the batch, behind others of so many rows and pairs. False if an expert is not resident."""
        end = num_pairs + part.num_pairs
        if end > len(self._rows):
            self._rows, self._places = (np.resize(kept, 2 * end) for kept in (self._rows, self._places))
        local = self._places_in(layer)
        batch = slice(num_pairs, end)
        return decode(part.payload, part.num_pairs, num_rows, local, self._rows[batch], self._places[batch])

    def missing(self, layer: int, part: Slice) -> Ints:
        """The experts that a slice asks for and that are not resident."""
        experts = experts_of(part.payload, part.num_pairs)
        return np.unique(experts[self._places_in(layer)[experts] < 0])

    def run(self, layer: int, parts: list[Slice], out: Tensor) -> None:
        """Computes the batch, of these slices, into out [pairs of all, hidden].

        Batching changes no bits: grouped_mlp is row-invariant (DESIGN law 5).
        """
        num_pairs = out.shape[0]
        x = parts[0].x if len(parts) == 1 else torch.cat([part.x for part in parts])
        rows, places = torch.from_numpy(self._rows[:num_pairs]), torch.from_numpy(self._places[:num_pairs])
        self.compute(layer, x, rows, places, out)

    def compute(self, layer: int, x: Tensor, rows: Tensor, places: Tensor, out: Tensor) -> None:
        """x: [n, hidden] -> out: [P, hidden]; rows, places: int64 [P], each pair's row of x and place in the stack."""
        held = self._weights[layer]
        held.ops.grouped_mlp(x, rows, places, held.w13, held.w2, out=out)

    def _places_in(self, layer: int) -> Ints:
        return self.places_of[layer] if layer < len(self.places_of) else self._nowhere
