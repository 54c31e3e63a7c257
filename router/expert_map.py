"""The versioned expert map: which workers hold which (layer, logical expert).

A map is immutable and carries a monotone epoch; switching is swapping a pointer (DESIGN law 3).
Every map is checked before it is published: each (layer, expert) has a resident owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Owner:
    """One life of one expert worker: a restarted worker is another owner."""

    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """`replicas[layer][expert]` lists indices into `owners`."""

    epoch: int
    num_experts: int
    owners: tuple[Owner, ...]
    replicas: Mapping[int, tuple[tuple[int, ...], ...]]

    def check(self) -> None:
        """Raises ValueError naming the first (layer, expert) without a resident owner or with an unknown one."""
        for layer, experts in self.replicas.items():
            if len(experts) != self.num_experts:
                raise ValueError(
                    f"layer {layer}: the map lists {len(experts)} experts, the model has {self.num_experts}"
                )
            for expert, holders in enumerate(experts):
                if not holders:
                    raise ValueError(f"layer {layer} expert {expert}: no resident owner in map epoch {self.epoch}")
                if any(not 0 <= holder < len(self.owners) for holder in holders):
                    raise ValueError(f"layer {layer} expert {expert}: unknown owner in {holders}")

    def without(self, worker: str, epoch: int) -> ExpertMap:
        """The same map with one worker taken out. The result may fail `check`: the caller decides what that means."""
        kept = [index for index, owner in enumerate(self.owners) if owner.worker != worker]
        renumbered = {old: new for new, old in enumerate(kept)}
        replicas = {
            layer: tuple(tuple(renumbered[h] for h in holders if h in renumbered) for holders in experts)
            for layer, experts in self.replicas.items()
        }
        return ExpertMap(epoch, self.num_experts, tuple(self.owners[index] for index in kept), replicas)

    def replica_counts(self, layer: int) -> list[int]:
        """Number of replicas of each expert of a layer."""
        return [len(holders) for holders in self.replicas[layer]]


def assign(num_experts: int, workers: Sequence[str], replicas: int) -> dict[str, tuple[int, ...]]:
    """Gives each expert to `min(replicas, len(workers))` workers, in contiguous ranges of nearly equal size.

    Copy r of expert e goes r places further round the ring of workers, so two copies never share a worker.
    """
    if not workers:
        raise ValueError("no expert workers to assign experts to: set experts.workers to at least 1")
    copies = min(replicas, len(workers))
    held: dict[str, list[int]] = {worker: [] for worker in workers}
    for expert in range(num_experts):
        home = expert * len(workers) // num_experts
        for copy in range(copies):
            held[workers[(home + copy) % len(workers)]].append(expert)
    return {worker: tuple(sorted(experts)) for worker, experts in held.items()}


def build_map(
    epoch: int, num_experts: int, layers: Sequence[int], owners: Sequence[Owner], held: Mapping[str, Sequence[int]]
) -> ExpertMap:
    """The map in which every worker holds the same experts in every MoE layer."""
    holders = tuple(
        tuple(index for index, owner in enumerate(owners) if expert in set(held[owner.worker]))
        for expert in range(num_experts)
    )
    return ExpertMap(epoch, num_experts, tuple(owners), dict.fromkeys(layers, holders))
