"""The replica bias: decides which physical replica serves an expert; never changes an output (DESIGN law 6).

`b[worker] += speed * sign(mean_load - load[worker])` after every update. The choice per (layer, expert) is the replica
with the largest `b[worker] + u(layer, expert, worker)`, where u is a fixed draw from [0, 1): so the share of experts
that a worker serves moves smoothly with its bias instead of flipping all at once, and a step needs one table, not a
decision per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .expert_map import ExpertMap

SPEED = 0.01
BIAS_LIMIT = 1.0  # u spans [0, 1): a wider bias changes nothing more


class ReplicaBias:
    """Keeps the bias of each owner of one map and the table of choices made from it."""

    def __init__(self, expert_map: ExpertMap, layers: Sequence[int], dead: Sequence[int] = ()) -> None:
        self.layers = list(layers)
        self.bias = np.zeros(len(expert_map.owners))
        self._jitter = _jitter(len(self.layers), expert_map.num_experts, len(expert_map.owners))
        self._holds = np.zeros(self._jitter.shape, dtype=bool)
        for row, layer in enumerate(self.layers):
            for expert, holders in enumerate(expert_map.replicas[layer]):
                self._holds[row, expert, list(holders)] = True
        for owner in dead:
            self._holds[:, :, owner] = False

    def table(self) -> npt.NDArray[np.int64]:
        """[num_layers, num_experts] index of the owner to send to; -1 where no live replica is left."""
        if not len(self.bias):
            return np.full(self._holds.shape[:2], -1, dtype=np.int64)
        score = np.where(self._holds, self._jitter + self.bias, -np.inf)
        return np.where(self._holds.any(-1), score.argmax(-1), -1)

    def drop(self, owner: int) -> None:
        """Takes a dead owner out of every choice."""
        self._holds[:, :, owner] = False

    def forget(self, layer_row: int, experts: npt.NDArray[np.int64], owner: int) -> None:
        """Takes an owner out of the choices for some experts of one layer."""
        self._holds[layer_row, experts, owner] = False

    def update(self, load: npt.NDArray[np.float64], speed: float = SPEED) -> None:
        """load: [num_owners] rows served since the last update; owners without a live replica do not count."""
        live = self._holds.any((0, 1))
        if live.sum() < 2:
            return
        self.bias[live] += speed * np.sign(load[live].mean() - load[live])
        np.clip(self.bias, -BIAS_LIMIT, BIAS_LIMIT, out=self.bias)


def _jitter(num_layers: int, num_experts: int, num_owners: int) -> npt.NDArray[np.float64]:
    """Fixed numbers in [0, 1), independent for every (layer row, expert, owner); every process draws the same."""
    return np.random.default_rng(0).random((num_layers, num_experts, num_owners))
