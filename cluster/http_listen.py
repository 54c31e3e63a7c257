"""Serves an ASGI application on a port of our own, on the running event loop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

MAX_CONNECTIONS = 1024  # more are answered 503 at once
BACKLOG = 512
# An idle connection must be closed by the client first, or it may send its next request into the closing: proxies keep
# theirs for 60 s, uvicorn for 5 as clients of Python do.
IDLE_S = 75
GRACE_S = 1


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process belongs to somebody else, who decides what a signal means."""
        yield


class HttpListener:
    """Accepts connections from the moment it is made; `stop` lets answers under way end for GRACE_S."""

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        """Raises ValueError when the port cannot be had. asyncio's TCP transports set TCP_NODELAY themselves."""
        config = uvicorn.Config(
            app,
            lifespan="off",  # whoever made the application runs it
            access_log=False,
            log_config=None,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
        self._server = _Server(config)
        self._serving = asyncio.ensure_future(self._server.serve([_bound(host, port)]))

    async def stop(self) -> None:
        self._server.should_exit = True
        await asyncio.wait([self._serving])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ValueError(f"HTTP cannot listen on {host}:{port}: {why}; choose another http_port") from error
