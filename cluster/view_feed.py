"""Keeps a front end's view of the cluster fresh: a long poll that outlives the controller's absence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ..actors.view import ClusterView
from .errors import ClusterNotFound

log = logging.getLogger(__name__)

Ask = Callable[[int], Awaitable[ClusterView | None]]
PAUSE_S = 0.5


async def follow(ask: Ask, apply: Callable[[ClusterView], Awaitable[None]]) -> None:
    """Runs until cancelled. A controller that does not answer changes nothing for the links that stand."""
    known_epoch, failures = 0, 0
    while True:
        try:
            view = await ask(known_epoch)
            if view is not None:
                log.info("view epoch %d: %s", view.epoch, ", ".join(worker.name for worker in view.workers))
                await apply(view)
                known_epoch = view.epoch
            failures = 0
        except Exception as error:  # this loop must not die: without it the front end would never see another view
            if not isinstance(error, ClusterNotFound) or failures == 0:
                log.warning("no view from the controller: %s", error)
            failures += 1
            await asyncio.sleep(PAUSE_S)
