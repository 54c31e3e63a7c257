"""The I/O half of the control plane: runs the state machine, carries out its instructions, watches the workers.

A plain class, made into an async actor by launch.py. It says nothing of Ray: workers, fronts and places come through
the Launcher it is given.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from ..actors.view import ClusterView
from .controller_settings import ControllerSettings
from .errors import StartFailed, WorkerDied, in_words
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
from .launcher import Launcher, WorkerHandle
from .plan import PoolPlan, plan_pools
from .state import ClusterState, Limits, Worker
from .status_report import report

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
PING_TIMEOUT_S = 5.0
APPLY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
LONG_POLL_S = 30.0
LEAVE_AFTER_S = 1.0


class Controller:
    """`up` brings the cluster up or raises with the reason; `view` feeds the fronts; `down` ends everything."""

    def __init__(
        self, settings: ControllerSettings, launcher: Launcher, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.launcher = launcher
        self.clock = clock
        pools = plan_pools(settings.spec, settings.model.num_experts)
        limits = Limits(start_s=settings.start_timeout_s)
        self.state = ClusterState(
            pools, settings.model.num_experts, settings.model.moe_layers, settings.spec.transport, limits
        )
        self.handles: dict[str, WorkerHandle] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.fronts: dict[str, dict[str, Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._published = asyncio.Event()
        self._ended = asyncio.Event()

    # --- what others ask ---

    async def up(self) -> dict[str, Any]:
        """Returns the status once the cluster serves. Raises StartFailed after everything was taken down again.

        Whoever asks while it starts, or later, waits for the same start.
        """
        if self.state.phase == "planned":
            self._handle(Begin(self.clock()))
            self._spawn(self._supervise())
        while self.state.phase in ("starting", "joining"):
            await self._next_change()
        if self.state.phase in ("stopping", "stopped"):
            await self._ended.wait()
            raise StartFailed(self.state.failure or "it was asked to stop while starting")
        return await self.status()

    async def view(self, known_epoch: int, patience_s: float = LONG_POLL_S) -> ClusterView | None:
        """The current view if it is newer, or the next one; None after `patience_s` at most: a long poll."""
        if self.state.view is None or self.state.view.epoch <= known_epoch:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._published.wait(), patience_s)
        view = self.state.view
        return view if view is not None and view.epoch > known_epoch else None

    async def status(self) -> dict[str, Any]:
        """Fresh figures of every worker that answers a ping in time, the last known ones of the others."""
        await asyncio.gather(*[self._glance(worker) for worker in self._awake()])
        return report(self.settings, self.state, self.reports, self.fronts)

    async def down(self, reason: str) -> None:
        """Idempotent; returns when nothing is left."""
        if self.state.phase == "stopped":
            return
        self._handle(Stop(self.clock(), reason))
        await self._ended.wait()

    # --- the machine and its hands ---

    def _handle(self, event: Event) -> None:
        instructions = self.state.handle(event)
        self.state.validate()
        for instruction in instructions:
            log.info("%s", instruction)
            self._execute(instruction)
        self._changed.set()
        self._changed = asyncio.Event()

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Place():
                self._spawn(self._place(instruction.pool))
            case StartFront():
                self._spawn(self._start_front(instruction.front))
            case StartWorker():
                self._spawn(self._start_worker(instruction))
            case Apply():
                self._spawn(self._apply(instruction))
            case Kill():
                self.handles[instruction.worker].kill()
            case TearDown():
                self._spawn(self._tear_down())
            case Publish():
                self._published.set()
                self._published = asyncio.Event()

    async def _place(self, pool: PoolPlan) -> None:
        try:
            nodes = await self.launcher.place(pool, self.settings.place_timeout_s)
        except StartFailed as error:
            self._handle(PoolRefused(self.clock(), pool.name, str(error)))
        else:
            self._handle(PoolPlaced(self.clock(), pool.name, nodes))

    async def _start_front(self, front: FrontName) -> None:
        try:
            await self.launcher.start_front(front, self.settings)
            await self._until_it_answers(front)
        except Exception as error:  # whatever Serve or gRPC raise ends the start with its reason
            self._handle(FrontFailed(self.clock(), front, in_words(error)))
        else:
            self._handle(FrontReady(self.clock(), front))

    async def _until_it_answers(self, front: FrontName) -> None:
        """A front answers once it has a view and links to every attention worker in it."""
        while self.state.phase in ("starting", "joining"):
            self.fronts[front] = await self.launcher.check_front(front, self.settings)
            if self.fronts[front]["ready"]:
                return
            await asyncio.sleep(0.1)

    async def _start_worker(self, start: StartWorker) -> None:
        name, incarnation = start.worker.name, start.incarnation
        handle = self.launcher.start_worker(start.worker, self.settings.worker(start))
        self.handles[name] = handle
        watch = asyncio.ensure_future(self._watch_progress(name, handle))
        try:
            info = await handle.prepare()
        except Exception as error:  # the worker's own words are the reason why `up` fails
            self._handle(Broke(self.clock(), name, incarnation, in_words(error)))
        else:
            self._handle(Prepared(self.clock(), name, incarnation, info))
        finally:
            watch.cancel()

    async def _watch_progress(self, name: str, handle: WorkerHandle) -> None:
        while True:
            try:
                self.reports[name] = await handle.progress()
            except WorkerDied:
                return
            await asyncio.sleep(0.5)

    async def _apply(self, apply: Apply) -> None:
        try:
            await asyncio.wait_for(self.handles[apply.worker].apply(apply.view), APPLY_TIMEOUT_S)
        except Exception as error:
            if self.state.view is not apply.view:
                return  # a newer view is on its way, and tells it who is there now
            self._handle(Broke(self.clock(), apply.worker, apply.incarnation, in_words(error)))
        else:
            self._handle(Applied(self.clock(), apply.worker, apply.incarnation, apply.view.epoch))

    # --- supervision ---

    async def _supervise(self) -> None:
        """One of the loops that must not die: a defect here is logged and the next round tries again."""
        while self.state.phase not in ("stopping", "stopped"):
            try:
                self._handle(Tick(self.clock()))
                pings = [self._ping(worker) for worker in self._awake()]
                await asyncio.gather(*pings, *[self._check_front(front) for front in self.state.fronts])
            except Exception:
                log.exception("a round of supervision failed")
            await asyncio.sleep(PING_INTERVAL_S)

    def _awake(self) -> list[Worker]:
        if self.state.phase in ("stopping", "stopped"):
            return []
        return [worker for worker in self.state.workers.values() if worker.state in ("ready", "live")]

    async def _ping(self, worker: Worker) -> None:
        self._handle(await self._figures(worker))

    async def _glance(self, worker: Worker) -> None:
        """A ping that does not count when it is missed: many who look at a worker would be its end at once."""
        if not isinstance(told := await self._figures(worker), Missed):
            self._handle(told)

    async def _figures(self, worker: Worker) -> Answered | Missed | Broke:
        """Asks for them and keeps them; what came of it."""
        name, incarnation = worker.plan.name, worker.incarnation
        try:
            self.reports[name] = await asyncio.wait_for(self.handles[name].status(), PING_TIMEOUT_S)
        except WorkerDied as error:
            return Broke(self.clock(), name, incarnation, str(error))
        except TimeoutError:
            return Missed(self.clock(), name, incarnation, f"{PING_TIMEOUT_S:g} s each")
        except Exception as error:
            return Missed(self.clock(), name, incarnation, in_words(error))
        return Answered(self.clock(), name, incarnation)

    async def _check_front(self, front: FrontName) -> None:
        """Keeps the figures of a front that was ready once; one that stops answering is a problem to be told."""
        if not self.state.fronts[front]:
            return
        answer = await self.launcher.check_front(front, self.settings)
        if self.fronts.get(front, {}).get("ready") and not answer["ready"]:
            self._handle(FrontFailed(self.clock(), front, str(answer.get("reason", "it does not answer"))))
        elif answer["ready"] and front in self.state.failed_fronts:
            self._handle(FrontReady(self.clock(), front))
        self.fronts[front] = answer

    # --- the end ---

    async def _tear_down(self) -> None:
        """Fronts first, so that nobody asks any more; then workers, then places. Every step has a deadline."""
        fronts = await asyncio.gather(self.launcher.stop_fronts(self.settings), return_exceptions=True)
        workers = [self._end_worker(handle) for handle in self.handles.values()]
        ended = await asyncio.gather(*workers, return_exceptions=True)
        places = await asyncio.gather(self.launcher.tear_down(self.settings), return_exceptions=True)
        for error in (*fronts, *ended, *places):
            if error is not None:
                log.warning("while tearing down: %s", in_words(error))
        self._handle(TornDown(self.clock()))
        self._ended.set()
        asyncio.get_running_loop().call_later(LEAVE_AFTER_S, self.launcher.leave)  # whoever waits for it hears first

    async def _end_worker(self, handle: WorkerHandle) -> None:
        try:
            await asyncio.wait_for(handle.stop(), STOP_TIMEOUT_S)
        finally:
            handle.kill()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """A defect of ours ends a start with its traceback in the log, and is a problem to be told afterwards."""
        try:
            await work
        except Exception as error:
            log.exception("a defect in the controller")
            self._handle(Defect(self.clock(), in_words(error)))

    async def _next_change(self) -> None:
        await self._changed.wait()
