"""Which workers a spec asks for, where they may stand, and why Ray cannot place them: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..actors.view import Role
from ..router.expert_map import assign
from .errors import SpecError
from .spec import ClusterSpec, ExpertPool, Pool, Strategy

PoolName = Literal["prefill", "decode", "expert"]


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to be; `bundle` is its place in its pool's placement group."""

    name: str
    role: Role
    pool: PoolName
    bundle: int
    expert_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class PoolPlan:
    name: PoolName
    workers: tuple[WorkerPlan, ...]
    cpus: float
    strategy: Strategy
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine as Ray sees it. `cores` is what its workers share; on a Ray of our own Ray's figure means nothing."""

    name: str
    address: str
    cores: int
    cpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


def plan_pools(spec: ClusterSpec, num_experts: int) -> tuple[PoolPlan, ...]:
    """The pools with at least one worker. Without prefill workers the decode workers do both."""
    pools = [
        _attention("prefill", "prefill", spec.prefill),
        _attention("decode", "decode" if spec.prefill.workers else "both", spec.decode),
    ]
    if not spec.experts.colocated:
        pools.append(_experts(spec.experts, num_experts))
    return tuple(pool for pool in pools if pool.workers)


@dataclass(frozen=True, slots=True)
class Threads:
    """Of one worker: its share of the node's cores, and how many it may use while other workers wait for it."""

    share: int
    most: int


def threads_per_worker(node: Node, worker: WorkerPlan, on_node: Sequence[WorkerPlan]) -> Threads:
    """`on_node`: all workers there, this one too.

    Attention and expert workers take turns: while a batch's rows are at the experts, the attention worker waits for
    them, and the other way round. So those of the worker's own kind are the ones that it shares the cores with.
    """
    is_expert = worker.role == "expert"
    kin = sum((other.role == "expert") == is_expert for other in on_node)
    return Threads(max(1, node.cores // len(on_node)), max(1, node.cores // kin))


def explain_refusal(pool: PoolPlan, nodes: Sequence[Node]) -> str:
    """Why a pool has no place, in words, from what the live nodes have."""
    wanted = f"pool {pool.name}: {len(pool.workers)} x {pool.cpus:g} CPU, {pool.strategy}"
    if pool.labels:
        wanted += ", labels " + _labels(pool.labels)
    fitting = [node for node in nodes if all(node.labels.get(key) == value for key, value in pool.labels.items())]
    if not fitting:
        return f"{wanted}: none of the {len(nodes)} live nodes carries these labels; they carry " + "; ".join(
            f"{node.name}: {_labels(node.labels) or 'none'}" for node in nodes
        )
    if pool.strategy == "STRICT_SPREAD" and len(fitting) < len(pool.workers):
        return f"{wanted}: needs {len(pool.workers)} different nodes, there are {len(fitting)}; use SPREAD or add nodes"
    most = max(node.cpus for node in fitting)
    total = sum(node.cpus for node in fitting)
    if pool.cpus > most:
        return f"{wanted}: no node has {pool.cpus:g} CPU, the largest has {most:g}; lower {pool.name}.cpus"
    if pool.strategy == "STRICT_PACK" and pool.cpus * len(pool.workers) > most:
        return f"{wanted}: all on one node needs {pool.cpus * len(pool.workers):g} CPU, the largest has {most:g}"
    return f"{wanted}: {total:g} CPU on {len(fitting)} fitting nodes, too many of them taken by others"


def _attention(name: PoolName, role: Role, pool: Pool) -> PoolPlan:
    workers = tuple(WorkerPlan(f"{name}-{index}", role, name, index) for index in range(pool.workers))
    return PoolPlan(name, workers, pool.cpus, pool.strategy, pool.labels)


def _experts(pool: ExpertPool, num_experts: int) -> PoolPlan:
    if num_experts == 0:
        raise SpecError("experts: the model is dense and has no experts to give to workers; set experts: colocated")
    if pool.workers > num_experts:
        raise SpecError(
            f"experts.workers: {pool.workers} workers for {num_experts} experts a layer leaves some of them empty; "
            f"set at most {num_experts}"
        )
    names = [f"expert-{index}" for index in range(pool.workers)]
    held = assign(num_experts, names, pool.replicas)
    workers = tuple(WorkerPlan(name, "expert", "expert", index, held[name]) for index, name in enumerate(names))
    return PoolPlan("expert", workers, pool.cpus, pool.strategy, pool.labels)


def _labels(labels: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
