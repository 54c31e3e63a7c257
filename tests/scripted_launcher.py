"""Workers and front ends without processes, for the controller's tests: each does what its test tells it to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from braid.actors.settings import WorkerSettings
from braid.actors.view import ClusterView, WorkerInfo
from braid.cluster.controller_settings import ControllerSettings, ModelFacts
from braid.cluster.errors import WorkerDied
from braid.cluster.events import FrontName
from braid.cluster.plan import Node, PoolPlan, WorkerPlan
from braid.cluster.spec import from_dict

MODEL = ModelFacts("/models/tiny", 8, (1, 2), 100, 64, "DeepseekV3ForCausalLM")


def settings(start_timeout_s: float = 600.0, **spec: Any) -> ControllerSettings:
    return ControllerSettings(from_dict(spec), MODEL, b"s" * 32, (), "/run/s", True, start_timeout_s)


@dataclass
class ScriptedWorker:
    """`fail` maps a method to what it raises; `hang` holds a method back until it is set."""

    settings: WorkerSettings
    fail: dict[str, Exception] = field(default_factory=dict)
    hang: dict[str, asyncio.Event] = field(default_factory=dict)
    views: list[ClusterView] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    is_dead: bool = False

    async def _called(self, method: str) -> None:
        self.calls.append(method)
        if self.is_dead:
            raise WorkerDied("its process died: killed by the test")
        if method in self.hang:
            await self.hang[method].wait()
        if method in self.fail:
            raise self.fail[method]

    async def prepare(self) -> WorkerInfo:
        await self._called("prepare")
        told = self.settings
        return WorkerInfo(told.name, told.role, told.incarnation, "host", "", told.tcp_host, 1, 77, told.node)

    async def progress(self) -> dict[str, Any]:
        await self._called("progress")
        return {"phase": "loading", "done_bytes": 1, "total_bytes": 2}

    async def apply(self, view: ClusterView) -> None:
        await self._called("apply")
        self.views.append(view)

    async def status(self) -> dict[str, Any]:
        await self._called("status")
        counters = {"tokens": 5, "hops": 6, "prefix_query_tokens": 8, "prefix_hit_tokens": 2}
        return {"sequences": 1, "free_blocks": 3, "total_blocks": 4, "counters": counters}

    async def stop(self) -> None:
        await self._called("stop")

    def kill(self) -> None:
        self.calls.append("kill")
        self.is_dead = True


@dataclass
class ScriptedLauncher:
    """`place_error` and `front_error` make these steps fail; `done` records the order of what was asked."""

    place_error: Exception | None = None
    front_error: Exception | None = None
    worker_fail: dict[str, dict[str, Exception]] = field(default_factory=dict)
    worker_hang: dict[str, dict[str, asyncio.Event]] = field(default_factory=dict)
    workers: dict[str, ScriptedWorker] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    fronts_ready: bool = True

    async def place(self, pool: PoolPlan, timeout_s: float) -> tuple[Node, ...]:
        if self.place_error is not None:
            raise self.place_error
        return (Node("here", "127.0.0.1", 4),) * len(pool.workers)

    def start_worker(self, plan: WorkerPlan, settings: WorkerSettings) -> ScriptedWorker:
        fail, hang = self.worker_fail.get(plan.name, {}), self.worker_hang.get(plan.name, {})
        self.workers[plan.name] = ScriptedWorker(settings, fail, hang)
        return self.workers[plan.name]

    async def start_front(self, front: FrontName, settings: ControllerSettings) -> None:
        if self.front_error is not None:
            raise self.front_error

    async def check_front(self, front: FrontName, settings: ControllerSettings) -> dict[str, Any]:
        return {"ready": self.fronts_ready, "reason": "the test says so"}

    async def stop_fronts(self, settings: ControllerSettings) -> None:
        self.done.append("fronts stopped")

    async def tear_down(self, settings: ControllerSettings) -> None:
        self.done.append("places removed")

    def leave(self) -> None:
        """A second after the end, which a test that is slow to look may see or not."""
