"""The gRPC way in: braid.v1 with streaming, deadlines and cancellation, beside standard health and reflection."""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Never

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from . import braid_v1_pb2 as pb
from .callers import caller_of
from .front_check import address
from .front_end import FrontEnd
from .grpc_words import read_request, write_delta, write_info
from .request import ModelInfo, RequestRefused

SERVICE = "braid.v1.Braid"
HEALTH_PATH = "/grpc.health.v1.Health/"
TRACE_HEADERS = ("traceparent", "tracestate")
CLOSE_GRACE_S = 5.0
STATUS = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "internal": grpc.StatusCode.INTERNAL,
}

Context = grpc.aio.ServicerContext[Any, Any]


class GrpcServer:
    """A running server; `port` is the one that was bound."""

    def __init__(
        self, server: grpc.aio.Server, port: int, statuses: health.aio.HealthServicer, mirror: asyncio.Task[None]
    ) -> None:
        self.port = port
        self._server = server
        self._statuses = statuses
        self._mirror = mirror

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """Takes no more calls, lets those under way end for `grace_s`, then cancels them."""
        self._mirror.cancel()
        with suppress(asyncio.CancelledError):
            await self._mirror
        await self._statuses.enter_graceful_shutdown()  # NOT_SERVING, while calls under way go on
        await self._server.stop(grace_s)


async def serve_grpc(
    front: FrontEnd,
    host: str,
    port: int,
    model_info: ModelInfo,
    api_keys: Collection[str] = (),
    max_message_bytes: int = 8 << 20,
) -> GrpcServer:
    """Binds, then serves. Without API keys everybody may call. Raises ValueError when the port cannot be had."""
    options = [
        ("grpc.so_reuseport", 0),  # else a second server on the same port would silently get half of the calls
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),  # a caller that vanished without a word must not keep its KV blocks
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    server = grpc.aio.server(interceptors=[_ApiKeys(api_keys)] if api_keys else [], options=options)
    bound = _bind(server, host, port)
    server.add_generic_rpc_handlers((_Braid(front, model_info, api_keys).handlers(),))
    statuses = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(statuses, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await _set_health(statuses, front.ready)
    await server.start()
    return GrpcServer(server, bound, statuses, asyncio.create_task(_mirror_readiness(front, statuses)))


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    try:
        return server.add_insecure_port(address(host, port))
    except RuntimeError as error:  # gRPC does not say why: ask the system
        raise ValueError(
            f"gRPC cannot listen on {address(host, port)}: {_why_not(host, port)}; choose another grpc_port"
        ) from error


def _why_not(host: str, port: int) -> str:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return "it was in use a moment ago"


async def _mirror_readiness(front: FrontEnd, statuses: health.aio.HealthServicer) -> None:
    changed = asyncio.Event()
    unwatch = front.watch_ready(lambda _: changed.set())
    try:
        while True:
            await changed.wait()
            changed.clear()
            await _set_health(statuses, front.ready)
    finally:
        unwatch()


async def _set_health(statuses: health.aio.HealthServicer, is_ready: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in ("", SERVICE):
        await statuses.set(service, status)


class _Braid:
    def __init__(self, front: FrontEnd, info: ModelInfo, api_keys: Collection[str]) -> None:
        self.front = front
        self.info = info
        self.api_keys = api_keys

    def handlers(self) -> grpc.GenericRpcHandler:
        """Both take bytes: gRPC would answer UNKNOWN to those that are no message. GetModelInfo's say nothing."""
        generate: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
            self.generate, response_serializer=pb.GenerateResponse.SerializeToString
        )
        get_model_info: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            self.get_model_info, response_serializer=pb.ModelInfo.SerializeToString
        )
        handlers = {"Generate": generate, "GetModelInfo": get_model_info}
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def generate(self, message: bytes, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        metadata = dict(context.invocation_metadata() or ())
        carrier = {name: str(metadata[name]) for name in TRACE_HEADERS if name in metadata}
        caller = partial(caller_of, str(metadata.get("authorization", "")), self.api_keys)
        timeout_s = context.time_remaining()
        try:
            request = await read_request(message, self.front.tokenizer, self.info, carrier, timeout_s, caller)
            async with aclosing(self.front.generate(request)) as deltas:  # a cancelled call cancels the request
                async for delta in deltas:
                    yield write_delta(delta)
        except RequestRefused as refused:
            await _refuse(context, refused)

    async def get_model_info(self, message: bytes, context: Context) -> pb.ModelInfo:
        return write_info(self.info)


async def _refuse(context: Context, refused: RequestRefused) -> Never:
    trailing = () if refused.retry_after_s is None else (("retry-after", f"{refused.retry_after_s:g}"),)
    await context.abort(STATUS[refused.code], refused.message, trailing)


class _ApiKeys(grpc.aio.ServerInterceptor):
    """Lets in who brings `authorization: Bearer KEY`. Health checks are open: probes carry no keys."""

    def __init__(self, api_keys: Collection[str]) -> None:
        self.api_keys = [key.encode() for key in api_keys]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        metadata = dict(handler_call_details.invocation_metadata or ())
        scheme, _, key = str(metadata.get("authorization", "")).partition(" ")
        # every key is compared, so that the time tells nothing
        matches = [hmac.compare_digest(key.strip().encode(), known) for known in self.api_keys]
        is_known = scheme.lower() == "bearer" and any(matches)
        if is_known or handler_call_details.method.startswith(HEALTH_PATH):
            return await continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(_turn_away)


async def _turn_away(wire: object, context: Context) -> Never:
    told = "no API key, or a wrong one: send the metadata `authorization: Bearer KEY`"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, told)
