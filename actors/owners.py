"""Who is asked for which expert: the owners of one map whose lives are linked, weighed by the replica bias (law 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..router.expert_map import ExpertMap
from ..router.replica_bias import ReplicaBias
from .links import Link
from .pairs import Ints


class Owners:
    """Of one published map, until the next one. Nothing is sent here.

    `links`: of each owner, None where this life of it has none. `table`: int64 [layers, experts], the owner to ask, -1
    where nobody is left; `row_of_layer` says which row.
    """

    table: Ints

    def __init__(self, expert_map: ExpertMap, links: Mapping[str, Link]) -> None:
        layers = sorted(expert_map.replicas)
        lives = [(links.get(owner.worker), owner.incarnation) for owner in expert_map.owners]
        self.map = expert_map
        self.links = [link if link and link.peer.incarnation == life else None for link, life in lives]
        self.row_of_layer = {layer: row for row, layer in enumerate(layers)}
        self.served: npt.NDArray[np.float64] = np.zeros(len(lives))  # pairs of each owner since the last `balance`
        self.choose([link is not None and link.closed is None for link in self.links])

    def __len__(self) -> int:
        return len(self.links)

    def choose(self, is_useful: Sequence[bool]) -> None:
        """Whoever was left out before is taken in again, if it is useful now."""
        dead = [owner for owner, is_one in enumerate(is_useful) if not is_one]
        self._bias = ReplicaBias(self.map, list(self.row_of_layer), dead)
        self.table = self._bias.table()

    def leave_out(self, owner: int) -> None:
        """It has died."""
        self._bias.drop(owner)
        self.table = self._bias.table()

    def forget(self, layer: int, experts: Ints, owner: int) -> None:
        """The map says that it holds these experts of the layer, and it does not."""
        self._bias.forget(self.row_of_layer[layer], experts, owner)
        self.table = self._bias.table()

    def balance(self) -> None:
        """Moves the bias by what each has served since the last call."""
        self._bias.update(self.served)
        self.table = self._bias.table()
        self.served[:] = 0


def nobody(num_experts: int) -> Owners:
    """Before the first map: no layer has a row."""
    return Owners(ExpertMap(0, num_experts, (), {}), {})
