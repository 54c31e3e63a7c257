"""A front end follows the controller's views, through the controller's silence and its return."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from braid.actors.view import ClusterView
from braid.cluster.errors import ClusterNotFound
from braid.cluster.view_feed import follow


def test_views_are_applied_in_order_whatever_goes_wrong_between() -> None:
    script: list[ClusterView | Exception | None] = [
        ClusterNotFound("not yet"),
        ClusterView(1, (), None),
        None,
        RuntimeError("the controller is restarting"),
        ClusterView(2, (), None),
    ]
    asked: list[int] = []
    applied: list[int] = []
    done = asyncio.Event()

    async def ask(known_epoch: int) -> ClusterView | None:
        asked.append(known_epoch)
        if not script:
            await done.wait()
        step = script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def apply(view: ClusterView) -> None:
        applied.append(view.epoch)
        if view.epoch == 2:
            done.set()

    async def scenario() -> None:
        task = asyncio.ensure_future(follow(ask, apply))
        await done.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(scenario(), 240.0))
    assert applied == [1, 2]
    assert asked[:5] == [0, 0, 1, 1, 1]
