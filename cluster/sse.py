"""Server-sent events as OpenAI sends them, and what cuts an answer short: the client leaves, or stops reading."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, closing
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


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dump(body: Any) -> bytes:
    text = _ENCODER.encode(body)
    return text.encode() if text.isascii() else text.translate(_LINE_ENDS).encode()


def event(body: Any) -> bytes:
    """One event. Bytes are JSON already."""
    return b"data: " + (body if isinstance(body, bytes) else dump(body)) + b"\n\n"


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


class PatientSend:
    """Sends to one client. A send that has not ended after `timeout_s` cancels its task: ClientGone.

    One timer watches all sends of a stream: a timeout of its own for each would cost as much as the send.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._began: float | None = None
        self._is_late = False
        self._timer = self._loop.call_later(timeout_s, self._look)

    async def __call__(self, message: dict[str, Any]) -> None:
        self._began = self._loop.time()
        try:
            await self._send(message)
        except OSError as error:  # the server's way to say that the connection is closed
            raise ClientGone from error
        except asyncio.CancelledError as error:
            if not self._is_late or self._task is None or self._task.uncancel() > 0:
                raise
            raise ClientGone from error
        self._began = None

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._began is None else self._began) + self._timeout_s
        if due > now:
            self._timer = self._loop.call_at(due, self._look)
        elif self._task is not None:
            self._is_late = True
            self._task.cancel()


class EventStream(Response):
    """Sends `chunks` as events. A refusal before the first chunk is raised, so that it gets its own status; after that
    it becomes an error event, and the stream ends. However it ends, `chunks` is closed, which frees the sequences."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Any, None], send_timeout_s: float = SEND_TIMEOUT_S) -> None:
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
            with closing(PatientSend(send, self._send_timeout_s)) as patiently:
                await patiently({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await patiently({"type": "http.response.body", "body": event(first), "more_body": True})
                async for body in events:
                    await patiently({"type": "http.response.body", "body": body, "more_body": True})
                await patiently({"type": "http.response.body", "body": b""})

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


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
