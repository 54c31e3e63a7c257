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
SLACK = 1e-9  # shares such as 1/3 add up to hardly more than one


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to be; `bundle` is its place in its pool's placement group."""

    name: str
    role: Role
    pool: PoolName
    bundle: int
    expert_ids: tuple[int, ...] | None = None
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolPlan:
    name: PoolName
    workers: tuple[WorkerPlan, ...]
    cpus: float
    strategy: Strategy
    labels: Mapping[str, str] = field(default_factory=dict)
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


@dataclass(frozen=True, slots=True)
class Node:
    """A machine as Ray sees it. `cores` is what its workers share; on a Ray of our own Ray's figure means nothing."""

    name: str
    address: str
    cores: int
    cpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    gpus: float = 0.0

    def has(self, resource: str) -> float:
        return {"CPU": self.cpus, "GPU": self.gpus}[resource]


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
    them, and the other way round. Prefill workers compute in bursts, between which decode workers would leave cores
    idle. So those of the worker's own role are the ones that it shares the cores with.
    """
    kin = sum(other.role == worker.role for other in on_node)
    return Threads(max(1, node.cores // len(on_node)), max(1, node.cores // kin))


def explain_refusal(pool: PoolPlan, nodes: Sequence[Node]) -> str:
    """Why a pool has no place, in words, from what the live nodes have."""
    each = " and ".join(f"{amount:g} {resource}" for resource, amount in pool.resources.items())
    wanted = f"pool {pool.name}: {len(pool.workers)} x {each}, {pool.strategy}"
    if pool.labels:
        wanted += ", labels " + _labels(pool.labels)
    fitting = [node for node in nodes if all(node.labels.get(key) == value for key, value in pool.labels.items())]
    if not fitting:
        return f"{wanted}: none of the {len(nodes)} live nodes carries these labels; they carry " + "; ".join(
            f"{node.name}: {_labels(node.labels) or 'none'}" for node in nodes
        )
    if pool.strategy == "STRICT_SPREAD" and len(fitting) < len(pool.workers):
        return f"{wanted}: needs {len(pool.workers)} different nodes, there are {len(fitting)}; use SPREAD or add nodes"
    for resource, amount in reversed(pool.resources.items()):
        if told := _too_much(pool, resource, amount, fitting):
            return f"{wanted}: {told}"
    there = " and ".join(f"{sum(node.has(resource) for node in fitting):g} {resource}" for resource in pool.resources)
    told = f"{wanted}: {there} on {len(fitting)} fitting nodes, too many of them taken by others"
    return f"{told}; with a smaller share in gpus several workers use one GPU" if pool.gpus else told


def gpus_needed(pools: Sequence[PoolPlan]) -> int:
    """Whole GPUs of one machine that the workers take: shares of different GPUs do not make up another one."""
    left: list[float] = []
    for gpus in sorted((plan.gpus for pool in pools for plan in pool.workers if plan.gpus), reverse=True):
        place = next((place for place, room in enumerate(left) if room >= gpus - SLACK), None)
        if place is None:
            left.append(1.0 - gpus)
        else:
            left[place] -= gpus
    return len(left)


def _too_much(pool: PoolPlan, resource: str, amount: float, fitting: Sequence[Node]) -> str | None:
    most, all_of_them = max(node.has(resource) for node in fitting), amount * len(pool.workers)
    if resource == "GPU" and not most:
        return "no fitting node has a GPU that Ray knows of; set gpus to 0, or start Ray there with --num-gpus"
    if amount > most:
        key = "experts" if pool.name == "expert" else pool.name
        return f"no node has {amount:g} {resource}, the largest has {most:g}; lower {key}.{resource.lower()}s"
    if pool.strategy == "STRICT_PACK" and all_of_them > most:
        return f"all on one node needs {all_of_them:g} {resource}, the largest has {most:g}"
    if resource == "GPU" and all_of_them > (total := sum(node.gpus for node in fitting)):
        return f"needs {all_of_them:g} GPU, the {len(fitting)} fitting nodes have {total:g}; lower workers or gpus"
    return None


def _attention(name: PoolName, role: Role, pool: Pool) -> PoolPlan:
    workers = tuple(WorkerPlan(f"{name}-{index}", role, name, index, None, pool.gpus) for index in range(pool.workers))
    return PoolPlan(name, workers, pool.cpus, pool.strategy, pool.labels, pool.gpus)


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
    workers = tuple(
        WorkerPlan(name, "expert", "expert", index, held[name], pool.gpus) for index, name in enumerate(names)
    )
    return PoolPlan("expert", workers, pool.cpus, pool.strategy, pool.labels, pool.gpus)


def _labels(labels: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
