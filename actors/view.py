"""What every process of a cluster knows about the others: one immutable snapshot per epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..router.expert_map import ExpertMap

Role = Literal["prefill", "decode", "both", "expert"]
Transport = Literal["auto", "shm", "tcp"]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Where one life of one worker can be reached. `kernels`: the family its results are rounded by (law 5)."""

    name: str
    role: Role
    incarnation: int
    host_id: str
    unix_path: str
    tcp_host: str
    tcp_port: int
    pid: int
    node: str
    kernels: str = "reference"


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The live workers and the expert map of one epoch. `expert_map` is None when experts are colocated."""

    epoch: int
    workers: tuple[WorkerInfo, ...]
    expert_map: ExpertMap | None
    transport: Transport = "auto"

    def of_role(self, *roles: Role) -> list[WorkerInfo]:
        return [worker for worker in self.workers if worker.role in roles]
