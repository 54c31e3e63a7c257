"""The one file that says ray.remote: turns plain classes into actors and finds them places."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..actors.settings import WorkerSettings
from ..actors.view import ClusterView, WorkerInfo
from .controller import Controller
from .controller_settings import ControllerSettings, namespace_of
from .errors import ClusterNotFound, StartFailed, WorkerDied
from .events import FrontName
from .plan import Node, PoolPlan, WorkerPlan, explain_refusal
from .worker_process import WorkerProcess

T = TypeVar("T")
CONTROLLER = "controller"
GRPC_FRONT = "grpc-front"
LOOPBACK = "127.0.0.1"
LOCAL_PATIENCE_S = 10.0
SERVE_PATIENCE_S = 120.0  # what is not removed by then stays in somebody's Ray: a busy machine takes long over Serve
ON_HEAD = {"node:__internal_head__": 0.001}  # one host answers HTTP, gRPC and `status`


def start_controller(settings: ControllerSettings) -> Any:
    """The controller's actor handle; detached on an existing Ray, so that it outlives whoever started it."""
    actor = ray.remote(Controller).options(
        name=CONTROLLER,
        namespace=settings.namespace,
        lifetime=_lifetime(settings),
        num_cpus=0,
        resources=ON_HEAD,
        max_restarts=0,
    )
    try:
        return actor.remote(settings, RayLauncher(settings))
    except ValueError as error:  # the name is taken
        raise StartFailed(f"a cluster {settings.spec.name!r} is already up on this Ray: {error}") from None


def find_controller(name: str) -> Any:
    """Raises ClusterNotFound."""
    try:
        return ray.get_actor(CONTROLLER, namespace=namespace_of(name))
    except ValueError:
        raise ClusterNotFound(f"no cluster {name!r} is up on this Ray; start one with `braid up --address`") from None


class ViewFeed:
    """Asks the controller for views by its name, so that it can be handed to any process of the cluster."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._controller: Any = None

    async def __call__(self, known_epoch: int) -> ClusterView | None:
        if self._controller is None:
            self._controller = find_controller(self.name)
        view: ClusterView | None = await self._controller.view.remote(known_epoch)
        return view


class GrpcMetrics:
    """Asks the gRPC front end for its exposition, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self) -> bytes:
        actor = ray.get_actor(GRPC_FRONT, namespace=namespace_of(self.name))
        exposition: bytes = await actor.metrics.remote()
        return exposition


class RayWorker:
    """A worker's actor, with Ray's exceptions turned into ours and the worker's own."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def prepare(self) -> WorkerInfo:
        return await _unwrapped(self._actor.prepare.remote())

    async def progress(self) -> dict[str, Any]:
        return await _unwrapped(self._actor.progress.remote())

    async def apply(self, view: ClusterView) -> None:
        await _unwrapped(self._actor.apply.remote(view))

    async def status(self) -> dict[str, Any]:
        return await _unwrapped(self._actor.status.remote())

    async def stop(self) -> None:
        await _unwrapped(self._actor.stop.remote())

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


class RayLauncher:
    """Places, workers and front ends on Ray. Lives inside the controller's process."""

    def __init__(self, settings: ControllerSettings) -> None:
        self.settings = settings
        self._groups: dict[str, PlacementGroup] = {}
        self._grpc: Any = None
        self._deploying: asyncio.Future[None] | None = None

    async def place(self, pool: PoolPlan, timeout_s: float) -> tuple[Node, ...]:
        labels = [dict(pool.labels)] * len(pool.workers) if pool.labels else None
        group = placement_group(
            [pool.resources for _ in pool.workers],
            strategy=pool.strategy,
            name=f"{self.settings.namespace}-{pool.name}",
            lifetime=_lifetime(self.settings),
            bundle_label_selector=labels,
        )
        self._groups[pool.name] = group
        nodes = _nodes(self.settings.is_local)
        # Ray waits for ever for a place that cannot be; nodes of our own do not become more
        patience_s = min(timeout_s, LOCAL_PATIENCE_S) if self.settings.is_local else timeout_s
        if not await asyncio.to_thread(group.wait, patience_s):
            known = list(_nodes(self.settings.is_local).values())
            raise StartFailed(f"no place within {patience_s:g} s for {explain_refusal(pool, known)}")
        where = placement_group_table(group)["bundles_to_node_id"]
        nodes = _nodes(self.settings.is_local)
        return tuple(nodes[where[plan.bundle]] for plan in pool.workers)

    def start_worker(self, plan: WorkerPlan, settings: WorkerSettings) -> RayWorker:
        group = self._groups[plan.pool]
        reserved = group.bundle_specs[plan.bundle]
        actor = ray.remote(WorkerProcess).options(
            name=plan.name,
            namespace=self.settings.namespace,
            lifetime=_lifetime(self.settings),
            num_cpus=reserved["CPU"],
            num_gpus=reserved.get("GPU", 0.0),
            max_concurrency=4,  # progress and status answer while prepare runs
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=plan.bundle),
        )
        return RayWorker(actor.remote(settings))

    async def start_front(self, front: FrontName, settings: ControllerSettings) -> None:
        if front == "grpc":
            await self._start_grpc(settings)
        elif settings.with_http:
            from .http_serve import deploy

            name = settings.spec.name
            deploying = asyncio.to_thread(deploy, settings, ViewFeed(name), GrpcMetrics(name))
            self._deploying = asyncio.ensure_future(deploying)
            await self._deploying

    async def check_front(self, front: FrontName, settings: ControllerSettings) -> dict[str, Any]:
        from .front_check import check_grpc, check_http

        if front == "http":
            return await asyncio.to_thread(check_http, settings)
        return await check_grpc(self._grpc, settings)

    async def stop_fronts(self, settings: ControllerSettings) -> None:
        """Neither front end stays because the other one could not be stopped."""
        for error in await asyncio.gather(self._stop_grpc(), self._stop_http(settings), return_exceptions=True):
            if error is not None:
                raise error

    async def tear_down(self, settings: ControllerSettings) -> None:
        for group in self._groups.values():
            remove_placement_group(group)

    def leave(self) -> None:
        """Ends the controller's own process, which on an existing Ray nobody else would."""
        if not self.settings.is_local:
            ray.kill(find_controller(self.settings.spec.name), no_restart=True)

    async def _start_grpc(self, settings: ControllerSettings) -> None:
        from .front_actor import FrontActor

        actor = ray.remote(FrontActor).options(
            name=GRPC_FRONT,
            namespace=settings.namespace,
            lifetime=_lifetime(settings),
            num_cpus=0,
            resources=ON_HEAD,
            max_restarts=0,
        )
        self._grpc = actor.remote(settings, ViewFeed(settings.spec.name))
        await _unwrapped(self._grpc.start.remote())

    async def _stop_grpc(self) -> None:
        if self._grpc is None:
            return
        try:
            await asyncio.wait_for(_unwrapped(self._grpc.stop.remote()), 5.0)
        finally:
            ray.kill(self._grpc, no_restart=True)

    async def _stop_http(self, settings: ControllerSettings) -> None:
        """A deployment under way ends first, or it would outlive its deletion; on a Ray of our own it cannot."""
        if self._deploying is None:
            return
        from .http_serve import remove

        await asyncio.wait([self._deploying], timeout=0.0 if settings.is_local else SERVE_PATIENCE_S)
        patience_s = LOCAL_PATIENCE_S if settings.is_local else SERVE_PATIENCE_S
        await asyncio.wait_for(asyncio.to_thread(remove, settings), patience_s)


async def _unwrapped(call: Awaitable[T]) -> T:
    try:
        return await call
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except RayActorError as error:
        raise WorkerDied(_why_it_died(error)) from None


def _why_it_died(error: RayActorError) -> str:
    """Ray tells a page; what matters stands between these words."""
    text = " ".join(str(error).split())
    found = re.search(r"Worker exit detail: (.*?)\.? *(?:There are|Some common|$)", text)
    return f"its process died: {found[1] if found else text[:300]}"


def _lifetime(settings: ControllerSettings) -> str | None:
    return None if settings.is_local else "detached"


def _nodes(is_local: bool) -> dict[str, Node]:
    """The live nodes by Ray's id. On a Ray of our own the CPUs are made up, and everything stays on this host."""
    found = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            cpus = node["Resources"].get("CPU", 0.0)
            cores = len(os.sched_getaffinity(0)) if is_local else max(1, int(cpus))
            address = LOOPBACK if is_local else node["NodeManagerAddress"]
            labels = {key: value for key, value in node["Labels"].items() if not key.startswith("ray.io/node-id")}
            name = socket.gethostname() if is_local else node["NodeName"]
            found[node["NodeID"]] = Node(name, address, cores, cpus, labels, node["Resources"].get("GPU", 0.0))
    return found
