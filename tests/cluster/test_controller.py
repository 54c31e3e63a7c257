"""The controller with scripted workers: start, failed starts, supervision, tear-down. No Ray, no processes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from scripted_launcher import ScriptedLauncher, settings

from braid.cluster.controller import Controller
from braid.cluster.errors import StartFailed

LIMIT_S = 400.0


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


def test_up_reports_and_view_feeds_the_fronts() -> None:
    async def scenario() -> None:
        launcher = ScriptedLauncher()
        controller = Controller(settings(), launcher)
        status = await controller.up()
        assert status["state"] == "serving"
        assert [worker["name"] for worker in status["workers"]] == ["prefill-0", "decode-0", "expert-0", "expert-1"]
        assert status["expert_map"]["replicas"] == [2] * 8
        view = await controller.view(0)
        assert view is not None
        assert view.epoch == 1
        assert await controller.view(1, 0.1) is None
        assert launcher.workers["decode-0"].views == [view]
        assert launcher.workers["expert-1"].settings.expert_ids == tuple(range(8))
        assert launcher.workers["decode-0"].settings.num_threads == 1
        await controller.down("test")

    run(scenario())


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        (ScriptedLauncher(place_error=StartFailed("no room for pool decode")), "^no room for pool decode$"),
        (ScriptedLauncher(front_error=OSError("port 8000 taken")), "http front end failed: OSError: port 8000 taken"),
        (
            ScriptedLauncher(worker_fail={"decode-0": {"prepare": ValueError("needs 3 GB")}}),
            "^decode-0: needs 3 GB$",
        ),
        (
            ScriptedLauncher(worker_fail={"expert-1": {"apply": ConnectionError("refused")}}),
            "^expert-1: ConnectionError: refused$",
        ),
    ],
)
def test_a_failed_start_gives_the_reason_and_leaves_nothing(launcher: ScriptedLauncher, reason: str) -> None:
    async def scenario() -> None:
        controller = Controller(settings(), launcher)
        with pytest.raises(StartFailed, match=reason):
            await controller.up()
        assert launcher.done == ["fronts stopped", "places removed"]
        assert all(worker.is_dead for worker in launcher.workers.values())
        assert (await controller.status())["state"] == "stopped"

    run(scenario())


def test_a_worker_that_never_gets_ready_is_named() -> None:
    async def scenario() -> None:
        launcher = ScriptedLauncher(worker_hang={"prefill-0": {"prepare": asyncio.Event()}})
        with pytest.raises(StartFailed, match=r"not ready within 0\.5 s; still waiting for prefill-0"):
            await Controller(settings(start_timeout_s=0.5), launcher).up()

    run(scenario())


def test_progress_is_told_while_workers_load() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        launcher = ScriptedLauncher(worker_hang={"decode-0": {"prepare": gate}})
        controller = Controller(settings(), launcher)
        rising = asyncio.ensure_future(controller.up())
        while "decode-0" not in controller.reports:
            await asyncio.sleep(0)
        status = await controller.status()
        assert status["state"] == "starting"
        assert status["workers"][1]["loading"] == {"phase": "loading", "done_bytes": 1, "total_bytes": 2}
        gate.set()
        assert (await rising)["state"] == "serving"
        await controller.down("test")

    run(scenario())


def test_a_dead_worker_leaves_the_next_view() -> None:
    async def scenario() -> None:
        launcher = ScriptedLauncher()
        controller = Controller(settings(), launcher)
        await controller.up()
        launcher.workers["expert-0"].is_dead = True
        view = None
        while view is None:  # the next round of pings finds it
            view = await controller.view(1)
        assert [worker.name for worker in view.workers] == ["prefill-0", "decode-0", "expert-1"]
        while launcher.workers["decode-0"].views[-1] != view:
            await asyncio.sleep(0)
        status = await controller.status()
        assert status["state"] == "degraded"
        assert status["problems"] == ["expert-0 is lost: its process died: killed by the test"]
        assert status["expert_map"]["replicas"] == [1] * 8
        assert [worker["state"] for worker in status["workers"]] == ["live", "live", "lost", "live"]
        await controller.down("test")

    run(scenario())


def test_who_asks_again_waits_for_the_same_start() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        launcher = ScriptedLauncher(worker_hang={"decode-0": {"prepare": gate}})
        controller = Controller(settings(), launcher)
        first, second = asyncio.ensure_future(controller.up()), asyncio.ensure_future(controller.up())
        while "decode-0" not in controller.reports:
            await asyncio.sleep(0)
        assert not second.done()
        gate.set()
        states = [(await rising)["state"] for rising in (first, second)]
        assert [*states, (await controller.up())["state"]] == ["serving"] * 3
        assert launcher.workers["decode-0"].calls.count("prepare") == 1
        await controller.down("test")

    run(scenario())


def test_many_who_look_at_a_silent_worker_are_not_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braid.cluster.controller.PING_TIMEOUT_S", 0.01)
    monkeypatch.setattr("braid.cluster.controller.PING_INTERVAL_S", 3600.0)  # supervision looks once, at the start

    async def scenario() -> None:
        launcher = ScriptedLauncher()
        controller = Controller(settings(), launcher)
        await controller.up()
        launcher.workers["decode-0"].hang["status"] = asyncio.Event()
        launcher.workers["expert-0"].is_dead = True
        statuses = [await controller.status() for _ in range(5)]
        states = {worker["name"]: worker["state"] for worker in statuses[-1]["workers"]}
        assert states == {"prefill-0": "live", "decode-0": "live", "expert-0": "lost", "expert-1": "live"}
        await controller.down("test")

    run(scenario())


def test_a_front_that_stops_answering_is_told() -> None:
    async def scenario() -> None:
        launcher = ScriptedLauncher()
        controller = Controller(settings(), launcher)
        await controller.up()
        launcher.fronts_ready = False
        while not controller.state.problems:
            await asyncio.sleep(0.01)
        assert "the http front end failed: the test says so" in controller.state.problems
        launcher.fronts_ready = True
        while controller.state.problems:
            await asyncio.sleep(0.01)
        await controller.down("test")

    run(scenario())


def test_down_while_starting_ends_up_too() -> None:
    async def scenario() -> None:
        launcher = ScriptedLauncher(worker_hang={"prefill-0": {"prepare": asyncio.Event()}})
        controller = Controller(settings(), launcher)
        rising = asyncio.ensure_future(controller.up())
        while "prefill-0" not in launcher.workers:
            await asyncio.sleep(0)
        await asyncio.gather(controller.down("test"), controller.down("twice"))
        with pytest.raises(StartFailed, match="asked to stop"):
            await rising
        assert launcher.done == ["fronts stopped", "places removed"]

    run(scenario())


def test_status_adds_up() -> None:
    async def scenario() -> None:
        controller = Controller(settings(experts="colocated", decode={"workers": 2}), ScriptedLauncher())
        await controller.up()
        while len(controller.reports) < 3 or "sequences" not in controller.reports["decode-1"]:
            await asyncio.sleep(0.01)
        status = await controller.status()
        assert status["expert_map"] is None
        load = {"sequences": 3, "waiting": 0, "free_blocks": 9, "total_blocks": 12, "preemptions": 0}
        assert status["load"] == load | {"prefix_hit_rate": 0.25}
        assert status["workers"][0]["tokens"] == 5
        assert status["workers"][0]["hops"] == 6
        await controller.down("test")

    run(scenario())
