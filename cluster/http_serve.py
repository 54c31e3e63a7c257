"""The OpenAI HTTP front end as a Ray Serve application: one replica holds the FrontEnd and its FastAPI app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from .controller_settings import ControllerSettings
from .errors import StartFailed
from .front_parts import make_front, model_info
from .http_api import build_app
from .metrics_sum import add_up
from .view_feed import Ask, follow

MAX_ONGOING = 512
DEPLOYMENT = "http"
METRICS_INTERVAL_S = 1.0

AskMetrics = Callable[[], Awaitable[bytes]]


class HttpFront:
    """Lives in the replica; Serve asks it for the ASGI app and runs the app's lifespan on the replica's loop."""

    def __init__(self, settings: ControllerSettings, ask: Ask, ask_metrics: AskMetrics) -> None:
        self.settings = settings
        self.ask = ask
        self.ask_metrics = ask_metrics
        self.grpc_metrics = b""

    def __serve_build_asgi_app__(self) -> FastAPI:
        front = make_front(self.settings, DEPLOYMENT)
        app = build_app(
            lambda: front,
            model_info(self.settings),
            lambda: add_up([front.metrics.render(), self.grpc_metrics]),
            frozenset(self.settings.api_keys),
            int(self.settings.spec.front_end.max_body_mb * 2**20),
        )

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            tasks = [asyncio.ensure_future(work) for work in (follow(self.ask, front.apply), self._poll_metrics())]
            yield
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await front.close()
            front.tracer.close()

        app.router.lifespan_context = lifespan
        return app

    async def _poll_metrics(self) -> None:
        """/metrics speaks for both front ends: what the gRPC one counts is asked for every second."""
        while True:
            with suppress(Exception):  # it is starting, or gone: its last figures stay
                self.grpc_metrics = await asyncio.wait_for(self.ask_metrics(), METRICS_INTERVAL_S * 5)
            await asyncio.sleep(METRICS_INTERVAL_S)


def application(settings: ControllerSettings, ask: Ask, ask_metrics: AskMetrics) -> serve.Application:
    made: serve.Deployment = serve.deployment(serve.ingress()(HttpFront))  # type: ignore[assignment]
    deployment = made.options(
        name=DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=2.0,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment.bind(settings, ask, ask_metrics)


def deploy(settings: ControllerSettings, ask: Ask, ask_metrics: AskMetrics) -> None:
    """Starts Serve where there is none, then the application. Raises StartFailed when somebody else's is in the way."""
    front = settings.spec.front_end
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None and running.http_config.port != front.http_port:
        raise StartFailed(
            f"Serve already runs on this Ray with HTTP port {running.http_config.port}: "
            f"set front_end.http_port to it (this spec says {front.http_port})"
        )
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": front.host, "port": front.http_port},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    others = [name for name in serve.status().applications if name != settings.namespace]
    if others:
        raise StartFailed(f"Serve on this Ray already has applications ({', '.join(others)}): delete them first")
    serve.run(application(settings, ask, ask_metrics), name=settings.namespace, route_prefix="/", blocking=False)


def remove(settings: ControllerSettings) -> None:
    """Deletes the application, and Serve with it when nothing else uses it and it will not end with Ray anyway."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        return
    serve.delete(settings.namespace)
    if not settings.is_local and not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]
