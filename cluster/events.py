"""What can happen to a cluster (events) and what is to be done about it (instructions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..actors.view import ClusterView, WorkerInfo
from .plan import Node, PoolPlan, Threads, WorkerPlan

FrontName = Literal["http", "grpc"]


@dataclass(frozen=True, slots=True)
class Begin:
    at: float


@dataclass(frozen=True, slots=True)
class PoolPlaced:
    """`nodes[i]` is where bundle i stands."""

    at: float
    pool: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class PoolRefused:
    at: float
    pool: str
    reason: str


@dataclass(frozen=True, slots=True)
class Prepared:
    at: float
    worker: str
    incarnation: int
    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class Applied:
    """A worker has taken over the view of this epoch and its links stand."""

    at: float
    worker: str
    incarnation: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Answered:
    at: float
    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Missed:
    """A ping came back too late or not at all."""

    at: float
    worker: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Broke:
    """The worker's process died, or it said itself that it cannot go on."""

    at: float
    worker: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class FrontReady:
    at: float
    front: FrontName


@dataclass(frozen=True, slots=True)
class FrontFailed:
    at: float
    front: FrontName
    reason: str


@dataclass(frozen=True, slots=True)
class Defect:
    """The controller itself failed at something."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    at: float


@dataclass(frozen=True, slots=True)
class Stop:
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class TornDown:
    at: float


Event = (
    Begin
    | PoolPlaced
    | PoolRefused
    | Prepared
    | Applied
    | Answered
    | Missed
    | Broke
    | FrontReady
    | FrontFailed
    | Defect
    | Tick
    | Stop
    | TornDown
)


@dataclass(frozen=True, slots=True)
class Place:
    pool: PoolPlan


@dataclass(frozen=True, slots=True)
class StartFront:
    front: FrontName


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: WorkerPlan
    incarnation: int
    node: Node
    threads: Threads


@dataclass(frozen=True, slots=True)
class Publish:
    """Makes this the view that fronts are given."""

    view: ClusterView


@dataclass(frozen=True, slots=True)
class Apply:
    worker: str
    incarnation: int
    view: ClusterView


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker given up on must not come back with an old incarnation."""

    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class TearDown:
    """Ends everything; `failure` is why the start failed, None when somebody asked."""

    failure: str | None


Instruction = Place | StartFront | StartWorker | Publish | Apply | Kill | TearDown
