"""The OpenAI HTTP interface on top of a front end: an ASGI application that knows nothing of Ray."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from . import http_errors
from .callers import caller_of
from .http_answer import Exchange, Front, chunks, whole
from .http_errors import ApiError
from .http_requests import Call, understand
from .http_schema import AnyBody, ChatBody, CompletionBody, parse
from .metrics import CONTENT_TYPE
from .request import ModelInfo, RequestRefused
from .sse import ClientGone, EventStream, dump, unless_disconnected

BODY_TIMEOUT_S = 60.0
LARGE_BODY = 32 * 1024  # from here on a body is read and tokenized beside the event loop
READ = ["GET", "HEAD"]
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")


def build_app(
    front: Callable[[], Front],
    info: ModelInfo,
    metrics: Callable[[], Awaitable[bytes]],
    api_keys: frozenset[str] = frozenset(),
    max_body_bytes: int = 8 * 2**20,
) -> FastAPI:
    """`front` is asked anew for every request, so that it may be made after the application. No keys: open to all."""
    app = FastAPI(title="Braid", openapi_url=None)
    http_errors.install(app)
    app.add_middleware(ApiKeys, keys=api_keys)
    _add_status_routes(app, front, info, metrics)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, CompletionBody, front(), info, max_body_bytes, api_keys)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, ChatBody, front(), info, max_body_bytes, api_keys)

    return app


def _add_status_routes(
    app: FastAPI, front: Callable[[], Front], info: ModelInfo, metrics: Callable[[], Awaitable[bytes]]
) -> None:
    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return _json({"object": "list", "data": [model_card(info)]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def model(name: str) -> Response:
        if name != info.name:
            message = f"the model {name!r:.120} does not exist: this server has {info.name!r}"
            raise ApiError(message, "model", status=404, code="model_not_found")
        return _json(model_card(info))

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        if not front().ready:
            raise RequestRefused("unavailable", "not ready: the cluster is starting, or has lost its workers", 1.0)
        return _json({"status": "ok"})

    @app.api_route("/metrics", methods=READ)
    async def exposition() -> Response:
        return Response(await metrics(), headers={"content-type": CONTENT_TYPE})


def model_card(info: ModelInfo) -> dict[str, Any]:
    """`notices`: the terms a checkpoint's own licence files put on its use."""
    card = {"id": info.name, "object": "model", "created": info.created, "owned_by": "braid", "root": info.name}
    more = {"max_model_len": info.max_model_len, "architecture": info.architecture, "notices": list(info.notices)}
    return {**card, "parent": None, **more}


async def _answer(
    request: Request, kind: type[AnyBody], front: Front, info: ModelInfo, limit: int, api_keys: frozenset[str]
) -> Response:
    try:
        raw = await _read_body(request, limit)
        caller = partial(caller_of, request.headers.get("authorization", ""), api_keys)
        call = Call(uuid.uuid4().hex, int(time.time()), _carrier(request), caller)
        body, exchange = await _understand(raw, kind, front, info, call)
        if body.stream:
            return EventStream(chunks(front, exchange))
        return _json(await unless_disconnected(request.receive, whole(front, exchange)))
    except (ClientGone, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it; access logs do


async def _understand(
    raw: bytes, kind: type[AnyBody], front: Front, info: ModelInfo, call: Call
) -> tuple[AnyBody, Exchange]:
    def both() -> tuple[AnyBody, Exchange]:
        body = parse(kind, raw)
        return body, understand(body, front.tokenizer, info, call)

    return await asyncio.to_thread(both) if len(raw) >= LARGE_BODY else both()


async def _read_body(request: Request, limit: int) -> bytes:
    """Stops reading as soon as the body is too large."""
    too_large = ApiError(
        f"the body is larger than {limit} bytes: send less, or raise front_end.max_body_mb",
        status=413,
        code="body_too_large",
        headers={"connection": "close"},  # what is left of the body is not read
    )
    coding = request.headers.get("content-encoding", "")
    if coding.lower() not in ("", "identity"):
        raise ApiError(f"content-encoding is {coding!r:.80}: send the body as it is", status=415, code="encoded_body")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        message = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
        raise ApiError(message, status=408, code="timeout", headers={"connection": "close"}) from error
    return bytes(body)


def _carrier(request: Request) -> dict[str, str]:
    """The caller's trace context, to be handed on."""
    return {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}


def _json(body: Any) -> Response:
    return Response(dump(body), media_type="application/json")


class ApiKeys:
    """Lets in to /v1 who brings one of the keys. Probes and metrics stay open."""

    def __init__(self, app: ASGIApp, keys: frozenset[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or not _is_under_v1(scope) or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        body = http_errors.error_body(
            "no such API key: send one of this server's as `Authorization: Bearer KEY`",
            "authentication_error",
            None,
            "invalid_api_key",
        )
        headers = {"www-authenticate": "Bearer"}
        await Response(dump(body), 401, headers, "application/json")(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        sent = Headers(scope=scope).get("authorization", "").encode("latin-1")  # of several, the one `caller_of` gets
        scheme, _, key = sent.partition(b" ")
        # all keys are compared, each in constant time: the answer's timing tells nothing
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def _is_under_v1(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == "/v1" or path.startswith("/v1/")
