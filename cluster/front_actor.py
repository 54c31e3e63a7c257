"""The gRPC front end's process: a FrontEnd that follows the controller's views, and the server before it."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

from .controller_settings import ControllerSettings
from .front_parts import make_front, model_info
from .grpc_api import serve_grpc
from .view_feed import Ask, follow


class FrontActor:
    """A plain class; launch.py makes it an async actor, whose one event loop everything here shares."""

    def __init__(self, settings: ControllerSettings, ask: Ask) -> None:
        self.settings = settings
        self.ask = ask

    async def start(self) -> None:
        """Raises ValueError when the port cannot be had."""
        spec = self.settings.spec.front_end
        self.front = make_front(self.settings, "grpc")
        self.server = await serve_grpc(
            self.front,
            spec.host,
            spec.grpc_port,
            model_info(self.settings),
            self.settings.api_keys,
            int(spec.max_body_mb * 2**20),
        )
        self.following = asyncio.ensure_future(follow(self.ask, self.front.apply))

    async def metrics(self) -> bytes:
        return self.front.metrics.render()

    async def load(self) -> dict[str, Any]:
        return {"pid": os.getpid(), **self.front.load()}

    async def stop(self) -> None:
        """Refuses newcomers, gives streams a second to end, answers the rest with "unavailable"."""
        self.following.cancel()
        with suppress(asyncio.CancelledError):
            await self.following
        await self.server.close(1.0)
        await self.front.close()
        self.front.tracer.close()
