"""Server-sent events as OpenAI sends them, and what cuts an answer short: the client leaves, or stops reading."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .http_errors import internal_body, refusal_body
from .request import RequestRefused

SEND_TIMEOUT_S = 60.0  # a client that reads nothing for so long is gone
DONE = b"data: [DONE]\n\n"
# JSON leaves these as they are; clients that split text at every Unicode line end would cut an event there
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

T = TypeVar("T")
log = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody is left to answer."""


def dump(body: Any) -> bytes:
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_LINE_ENDS).encode()


def event(body: Any) -> bytes:
    return b"data: " + dump(body) + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled and awaited when the client leaves: ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Sends `chunks` as events. A refusal before the first chunk is raised, so that it gets its own status; after that
    it becomes an error event, and the stream ends. However it ends, `chunks` is closed, which frees the sequences."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        # x-accel-buffering: proxies must not gather events
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._write(send))
        except ClientGone:
            log.info("client left the stream")

    async def _write(self, send: Send) -> None:
        async with aclosing(self._chunks), aclosing(self._events()) as events:
            first = await anext(self._chunks)
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send(send, {"type": "http.response.body", "body": event(first), "more_body": True})
            async for body in events:
                await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._chunks:
                yield event(chunk)
            yield DONE
        except RequestRefused as refused:
            yield event(refusal_body(refused))
        except Exception:  # the status line is out: an event is the only way left to say it
            log.exception("a stream failed")
            yield event(internal_body())

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)
        except (TimeoutError, OSError) as error:  # OSError: the server's way to say that the connection is closed
            raise ClientGone from error


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
