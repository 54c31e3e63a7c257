"""The OpenAI HTTP front end as a Ray Serve application: one replica holds the FrontEnd and its FastAPI app.

Serve starts the replica, watches it and replaces it. Where we are not deployed behind a platform's Serve proxies the
replica listens itself: the proxy would cost a first token more than all the rest of the front end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from .controller_settings import ControllerSettings
from .front_parts import make_front, model_info
from .http_api import build_app
from .http_listen import HttpListener
from .metrics_sum import add_up
from .view_feed import Ask, follow

MAX_ONGOING = 512
DEPLOYMENT = "http"
METRICS_TIMEOUT_S = 2.0
READY_TIMEOUT_S = 30.0
ON_HEAD = {"node:__internal_head__": 0.001}

AskMetrics = Callable[[], Awaitable[bytes]]

log = logging.getLogger(__name__)


class HttpFront:
    """Lives in the replica; Serve asks it for the ASGI app and runs the app's lifespan on the replica's loop."""

    def __init__(self, settings: ControllerSettings, ask: Ask, ask_metrics: AskMetrics) -> None:
        self.settings = settings
        self.ask = ask
        self.ask_metrics = ask_metrics
        self.grpc_metrics = b""

    def __serve_build_asgi_app__(self) -> FastAPI:
        front = make_front(self.settings, DEPLOYMENT)
        spec = self.settings.spec.front_end

        async def metrics() -> bytes:
            return add_up([front.metrics.render(), await self._ask_grpc_metrics()])

        app = build_app(
            lambda: front,
            model_info(self.settings),
            metrics,
            frozenset(self.settings.api_keys),
            int(spec.max_body_mb * 2**20),
        )

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            listener = HttpListener(app, spec.host, spec.http_port) if self.settings.with_http else None
            following = asyncio.ensure_future(follow(self.ask, front.apply))
            if not self.settings.with_http:  # to the platform a replica that has started is ready for requests
                await front.wait_ready(READY_TIMEOUT_S)
            yield
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await front.close()
            if listener is not None:
                await listener.stop()
            front.tracer.close()

        app.router.lifespan_context = lifespan
        return app

    async def _ask_grpc_metrics(self) -> bytes:
        """/metrics speaks for both front ends. While the gRPC one is starting or gone, its last figures stay."""
        try:
            self.grpc_metrics = await asyncio.wait_for(self.ask_metrics(), METRICS_TIMEOUT_S)
        except Exception as error:  # Ray's many ways of saying that an actor is not there
            log.info("no figures of the gRPC front end: %s", error)
        return self.grpc_metrics


def application(settings: ControllerSettings, ask: Ask, ask_metrics: AskMetrics) -> serve.Application:
    made: serve.Deployment = serve.deployment(serve.ingress()(HttpFront))  # type: ignore[assignment]
    deployment = made.options(
        name=DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        # one host answers HTTP, gRPC and `status`; behind a platform's proxies it may stand anywhere
        ray_actor_options={"num_cpus": 0.1, "resources": ON_HEAD if settings.with_http else {}},
        graceful_shutdown_timeout_s=2.0,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment.bind(settings, ask, ask_metrics)


def deploy(settings: ControllerSettings, ask: Ask, ask_metrics: AskMetrics) -> None:
    """Starts Serve where there is none, without proxies; of one that is there the application takes no route."""
    serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False))
    serve.run(application(settings, ask, ask_metrics), name=settings.namespace, route_prefix=None, blocking=False)


def remove(settings: ControllerSettings) -> None:
    """Deletes the application, and Serve with it when nothing else uses it and it will not end with Ray anyway."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        return
    serve.delete(settings.namespace)
    if not settings.is_local and not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]
