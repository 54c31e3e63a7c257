"""When a replica counts as started: Serve sends requests to one that does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from scripted_launcher import settings
from scripted_worker import SECRET, ScriptedWorker, run, until, view_of, write_tokenizer
from waiting import LIMIT_S

from braid.actors.view import ClusterView
from braid.cluster import http_serve
from braid.cluster.controller_settings import ControllerSettings
from braid.cluster.http_serve import HttpFront


def behind_a_platform(directory: Path) -> ControllerSettings:
    made: ControllerSettings = settings()
    model = replace(made.model, path=str(write_tokenizer(directory)))
    return replace(made, model=model, secret=SECRET, with_http=False)


async def no_metrics() -> bytes:
    return b""


def test_a_replica_behind_a_platform_starts_once_it_is_ready(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_serve, "READY_TIMEOUT_S", LIMIT_S)

    async def scenario() -> None:
        prefill, decode = ScriptedWorker(run_dir, "prefill-0", "prefill"), ScriptedWorker(run_dir, "decode-0", "decode")
        views = iter((view_of(prefill), view_of(prefill, decode, epoch=2)))
        may_see_decode = asyncio.Event()

        async def ask(known_epoch: int) -> ClusterView | None:
            if known_epoch:
                await may_see_decode.wait()
            return next(views, None) or await asyncio.Future()

        app = HttpFront(behind_a_platform(tmp_path), ask, no_metrics).__serve_build_asgi_app__()
        lifespan = app.router.lifespan_context(app)
        starting = asyncio.ensure_future(lifespan.__aenter__())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            await until(lambda: prefill.num_links == 1, "the link to the prefill worker")
            assert (await client.get("/health")).status_code == 503
            assert not starting.done()
            may_see_decode.set()
            await starting
            assert (await client.get("/health")).status_code == 200
        await lifespan.__aexit__(None, None, None)
        prefill.die()
        decode.die()

    run(scenario())


def test_it_starts_all_the_same_and_refuses_where_nobody_gets_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_serve, "READY_TIMEOUT_S", 0.05)

    async def ask(known_epoch: int) -> ClusterView | None:
        return await asyncio.Future()

    async def scenario() -> None:
        app = HttpFront(behind_a_platform(tmp_path), ask, no_metrics).__serve_build_asgi_app__()
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica")
        async with app.router.lifespan_context(app), client:
            answer = await client.get("/health")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    run(scenario())
