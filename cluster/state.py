"""The cluster's state machine: events in, instructions out. No clock, no socket, no Ray.

Start-up is all or nothing: whatever breaks before the cluster serves ends it with that reason. Afterwards a broken
worker is taken out of the next view and everybody else goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..actors.view import ClusterView, Transport, WorkerInfo
from ..router.expert_map import ExpertMap
from .errors import IllegalTransition
from .events import (
    Answered,
    Applied,
    Apply,
    Begin,
    Broke,
    Defect,
    Event,
    FrontFailed,
    FrontName,
    FrontReady,
    Instruction,
    Kill,
    Missed,
    Place,
    PoolPlaced,
    PoolRefused,
    Prepared,
    Publish,
    StartFront,
    StartWorker,
    Stop,
    TearDown,
    Tick,
    TornDown,
)
from .plan import Node, PoolPlan, WorkerPlan, threads_per_worker
from .views import first_map, gaps, map_without

WorkerState = Literal["planned", "starting", "ready", "live", "lost", "stopped"]
Phase = Literal["planned", "starting", "joining", "serving", "degraded", "stopping", "stopped"]

PLACING_GRACE_S = 10.0

# (what, from, to): when. Anything else raises with the story of the object.
TRANSITIONS: dict[tuple[Literal["cluster", "worker"], str, str], str] = {
    ("worker", "planned", "starting"): "its pool has a place",
    ("worker", "starting", "ready"): "it has loaded its weights and listens",
    ("worker", "ready", "live"): "its links of the published view stand",
    ("worker", "starting", "lost"): "it broke while starting",
    ("worker", "ready", "lost"): "it broke before the cluster served",
    ("worker", "live", "lost"): "it broke or fell silent",
    ("worker", "planned", "stopped"): "the cluster was torn down",
    ("worker", "starting", "stopped"): "the cluster was torn down",
    ("worker", "ready", "stopped"): "the cluster was torn down",
    ("worker", "live", "stopped"): "the cluster was torn down",
    ("worker", "lost", "stopped"): "the cluster was torn down",
    ("cluster", "planned", "starting"): "somebody asked for it",
    ("cluster", "starting", "joining"): "every worker is ready: the first view is published",
    ("cluster", "joining", "serving"): "every worker is live and the fronts answer",
    ("cluster", "serving", "degraded"): "a worker was lost",
    ("cluster", "planned", "stopping"): "somebody asked for it",
    ("cluster", "starting", "stopping"): "something broke or somebody asked for it",
    ("cluster", "joining", "stopping"): "something broke or somebody asked for it",
    ("cluster", "serving", "stopping"): "somebody asked for it",
    ("cluster", "degraded", "stopping"): "somebody asked for it",
    ("cluster", "stopping", "stopped"): "nothing is left",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """`start_s` bounds the way from Begin to serving; a worker that misses `max_missed` pings in a row is lost."""

    start_s: float = 600.0
    max_missed: int = 3


@dataclass(slots=True)
class Worker:
    plan: WorkerPlan
    incarnation: int
    state: WorkerState = "planned"
    node: Node | None = None
    info: WorkerInfo | None = None
    missed: int = 0
    reason: str = ""
    story: deque[str] = field(default_factory=lambda: deque(maxlen=50))


class ClusterState:
    """Knows every worker, the fronts and the current view; decides, and never acts."""

    def __init__(
        self,
        pools: Sequence[PoolPlan],
        num_experts: int,
        moe_layers: Sequence[int],
        transport: Transport = "auto",
        limits: Limits | None = None,
    ) -> None:
        self.pools = {pool.name: pool for pool in pools}
        self.workers = {plan.name: Worker(plan, 1) for pool in pools for plan in pool.workers}
        self.num_experts = num_experts
        self.moe_layers = tuple(moe_layers)
        self.transport: Transport = transport
        self.limits = limits or Limits()
        self.phase: Phase = "planned"
        self.view: ClusterView | None = None
        self.placed: dict[str, tuple[Node, ...]] = {}
        self.fronts: dict[FrontName, bool] = dict.fromkeys(get_args(FrontName), False)
        self.failed_fronts: dict[FrontName, str] = {}
        self.defects: tuple[str, ...] = ()
        self.failure: str | None = None
        self.began_at = 0.0
        self.story: deque[str] = deque(maxlen=200)
        self._handlers: dict[type[Event], Callable[..., list[Instruction]]] = {
            Begin: self._begin,
            PoolPlaced: self._pool_placed,
            PoolRefused: lambda event: self._give_up(event.reason),
            Prepared: self._prepared,
            Applied: self._applied,
            Answered: self._answered,
            Missed: self._missed,
            Broke: self._broke,
            FrontReady: self._front_ready,
            FrontFailed: self._front_failed,
            Defect: lambda event: self._give_up(f"a defect in the controller: {event.reason}"),
            Tick: self._tick,
            Stop: self._stop,
            TornDown: self._torn_down,
        }

    def handle(self, event: Event) -> list[Instruction]:
        """Everything that follows from one event; nothing from an earlier life's, nor while the cluster is stopping."""
        if not isinstance(event, (Tick, Answered)):
            self.story.append(f"{event.at:.3f} {event}")
        if self.phase in ("stopping", "stopped") and not isinstance(event, TornDown):
            return []
        worker = self.workers.get(getattr(event, "worker", ""))
        if worker is not None and getattr(event, "incarnation", 0) != worker.incarnation:
            return []
        return self._handlers[type(event)](event)

    def validate(self) -> None:
        """The invariants, for tests and for the controller's own check after each event."""
        live = {worker.plan.name for worker in self.workers.values() if worker.state == "live"}
        if self.phase in ("serving", "degraded"):
            assert self.view is not None, f"{self.phase} without a view"
            seen = {info.name for info in self.view.workers}
            assert live <= seen, f"live workers outside the view: {live - seen}"
            lost = {name for name, worker in self.workers.items() if worker.state == "lost"}
            assert not lost & seen, f"lost workers in the view: {lost & seen}"
        if self.phase == "serving":
            assert len(live) == len(self.workers), "serving with a worker that is not live"
        for worker in self.workers.values():
            assert worker.info is not None or worker.state not in ("ready", "live"), (
                f"{worker.plan.name} has no address"
            )

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong now."""
        if self.view is None:
            return ()
        lost = [f"{w.plan.name} is lost: {w.reason}" for w in self.workers.values() if w.state == "lost"]
        fronts = [f"the {front} front end failed: {reason}" for front, reason in self.failed_fronts.items()]
        return (*lost, *gaps(self.view), *fronts, *self.defects)

    # --- start ---

    def _begin(self, event: Begin) -> list[Instruction]:
        self._move("starting")
        self.began_at = event.at
        fronts: list[Instruction] = [StartFront(front) for front in self.fronts]
        return [Place(pool) for pool in self.pools.values()] + fronts

    def _pool_placed(self, event: PoolPlaced) -> list[Instruction]:
        """Workers start once every pool has its place: only then is it known how many share a node."""
        self.placed[event.pool] = event.nodes
        if len(self.placed) < len(self.pools):
            return []
        for worker in self.workers.values():
            worker.node = self.placed[worker.plan.pool][worker.plan.bundle]
            self._move_worker(worker, "starting")
        return [self._start(worker) for worker in self.workers.values()]

    def _start(self, worker: Worker) -> StartWorker:
        assert worker.node is not None
        on_node = [other.plan for other in self.workers.values() if other.node == worker.node]
        threads = threads_per_worker(worker.node, worker.plan, on_node)
        return StartWorker(worker.plan, worker.incarnation, worker.node, threads)

    def _prepared(self, event: Prepared) -> list[Instruction]:
        worker = self.workers[event.worker]
        worker.info = event.info
        self._move_worker(worker, "ready")
        if mixed := self._mixed_kernels():
            return self._give_up(mixed)
        if any(worker.state != "ready" for worker in self.workers.values()):
            return []
        self._move("joining")
        holders = [(w.plan, w.incarnation) for w in self.workers.values() if w.plan.expert_ids is not None]
        return self._publish(first_map(holders, self.num_experts, self.moe_layers))

    def _mixed_kernels(self) -> str | None:
        """Why these workers must not serve together: a token's bits would depend on who computes it (law 5)."""
        names: dict[str, list[str]] = {}
        for worker in self.workers.values():
            if worker.info is not None:
                names.setdefault(worker.info.kernels, []).append(worker.plan.name)
        if len(names) < 2:
            return None
        told = ", ".join(f"{kernels} on {' '.join(workers)}" for kernels, workers in names.items())
        return (
            f"the workers compute with different kernels and would round the same token differently: {told}. "
            "Place them on machines of one kind by labels, with braid installed alike: the native kernels need a C++ "
            "compiler at install time and AVX-512 (for bfloat16 also avx512_bf16)"
        )

    def _applied(self, event: Applied) -> list[Instruction]:
        worker = self.workers[event.worker]
        if worker.state == "ready":
            self._move_worker(worker, "live")
        return self._serve_if_complete()

    def _front_ready(self, event: FrontReady) -> list[Instruction]:
        """Also told of one that answers again: Serve replaces a replica that died."""
        self.fronts[event.front] = True
        self.failed_fronts.pop(event.front, None)
        return self._serve_if_complete()

    def _serve_if_complete(self) -> list[Instruction]:
        everybody = all(worker.state == "live" for worker in self.workers.values())
        if self.phase == "joining" and everybody and all(self.fronts.values()):
            self._move("serving")
        return []

    def _front_failed(self, event: FrontFailed) -> list[Instruction]:
        if self.phase not in ("serving", "degraded"):
            return self._give_up(f"the {event.front} front end failed: {event.reason}")
        self.failed_fronts[event.front] = event.reason
        return []

    def _tick(self, event: Tick) -> list[Instruction]:
        """Who looks for a place gives up by then too, and knows why there is none: that is worth a moment."""
        is_placed = len(self.placed) == len(self.pools)
        patience_s = self.limits.start_s + (0.0 if is_placed else PLACING_GRACE_S)
        if self.phase in ("starting", "joining") and event.at - self.began_at > patience_s:
            return self._give_up(f"not ready within {self.limits.start_s:g} s; still waiting for {self._waiting_for()}")
        return []

    def _waiting_for(self) -> str:
        pools = [f"a place for pool {name}" for name in self.pools if name not in self.placed]
        late = [name for name, worker in self.workers.items() if worker.state in ("starting", "ready")]
        fronts = [f"the {front} front end" for front, is_ready in self.fronts.items() if not is_ready]
        return ", ".join(pools or late or fronts)

    # --- life ---

    def _answered(self, event: Answered) -> list[Instruction]:
        self.workers[event.worker].missed = 0
        return []

    def _missed(self, event: Missed) -> list[Instruction]:
        worker = self.workers[event.worker]
        worker.missed += 1
        if worker.missed < self.limits.max_missed:
            return []
        return self._lose(worker, f"no answer to {worker.missed} pings in a row ({event.reason})")

    def _broke(self, event: Broke) -> list[Instruction]:
        return self._lose(self.workers[event.worker], event.reason)

    def _lose(self, worker: Worker, reason: str) -> list[Instruction]:
        if worker.state == "lost":
            return []
        self._move_worker(worker, "lost")
        worker.reason = reason
        if self.phase not in ("serving", "degraded"):
            return self._give_up(f"{worker.plan.name}: {reason}")
        if self.phase == "serving":
            self._move("degraded")
        kill: list[Instruction] = [Kill(worker.plan.name, worker.incarnation)]
        assert self.view is not None, "serving without a view"
        return kill + self._publish(map_without(self.view, worker.plan.name))

    # --- views ---

    def _publish(self, expert_map: ExpertMap | None) -> list[Instruction]:
        infos = tuple(w.info for w in self.workers.values() if w.state in ("ready", "live") and w.info is not None)
        epoch = self.view.epoch + 1 if self.view else 1
        self.view = ClusterView(epoch, infos, expert_map, self.transport)
        published: list[Instruction] = [Publish(self.view)]
        return published + [Apply(info.name, info.incarnation, self.view) for info in infos]

    # --- end ---

    def _stop(self, event: Stop) -> list[Instruction]:
        self._move("stopping")
        return [TearDown(None)]

    def _give_up(self, reason: str) -> list[Instruction]:
        if self.phase in ("serving", "degraded"):
            self.defects = (*self.defects, reason)
            return []
        self.failure = reason
        self._move("stopping")
        return [TearDown(reason)]

    def _torn_down(self, event: TornDown) -> list[Instruction]:
        self._move("stopped")
        for worker in self.workers.values():
            self._move_worker(worker, "stopped")
        return []

    def _move(self, finish: Phase) -> None:
        if ("cluster", self.phase, finish) not in TRANSITIONS:
            raise IllegalTransition(f"the cluster cannot go from {self.phase} to {finish}; story: {_told(self.story)}")
        self.phase = finish

    def _move_worker(self, worker: Worker, finish: WorkerState) -> None:
        worker.story.append(f"{worker.state} -> {finish}")
        if ("worker", worker.state, finish) not in TRANSITIONS:
            raise IllegalTransition(
                f"worker {worker.plan.name} cannot go from {worker.state} to {finish}; story: {_told(worker.story)}; "
                f"the cluster's: {_told(self.story)}"
            )
        worker.state = finish


def _told(story: deque[str]) -> str:
    return " | ".join(story) or "nothing yet"
