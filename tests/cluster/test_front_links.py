from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_worker import SECRET, WAIT_S, ScriptedWorker, run, until, view_of

from braid.actors.dialing import host_id
from braid.actors.handshake import welcome
from braid.actors.links import Hello
from braid.actors.listener import bind_unix
from braid.actors.messages import Kind
from braid.actors.reactor import Event
from braid.actors.view import ClusterView, WorkerInfo
from braid.cluster.front_links import FrontLinks, Joined, Left, News, Told
from braid.cluster.request import FrontEndSettings

SETTINGS = FrontEndSettings("front-0", SECRET, "tiny", vocab_size=257, max_model_len=64, link_timeout_s=2.0)


class Ear:
    """Notes what a front end hears."""

    def __init__(self) -> None:
        self.news: list[News] = []

    def hear(self, batch: list[News]) -> None:
        self.news += batch

    def loads(self) -> list[int]:
        return [news.body["load"]["free_blocks"] for news in self.news if isinstance(news, Told)]


def test_links_once_and_tells_in_order(run_dir: Path) -> None:
    async def scenario() -> None:
        worker, ear = ScriptedWorker(run_dir, "both-0", free_blocks=1), Ear()
        links = FrontLinks(SETTINGS, ear.hear)
        await links.apply(view_of(worker))
        await links.apply(view_of(worker, epoch=2))
        await until(lambda: ear.loads() == [1], "the load told on opening")
        worker.tell_load(free_blocks=2)
        await until(lambda: ear.loads() == [1, 2], "two loads")
        assert ear.news[0] == Joined("both-0", "both")
        assert len(ear.news) == 3
        await links.close()
        worker.die()

    run(scenario())


def test_a_worker_that_comes_late_is_dialled_again(run_dir: Path) -> None:
    async def scenario() -> None:
        early, ear = ScriptedWorker(run_dir, "both-0"), Ear()
        early.die()
        links = FrontLinks(SETTINGS, ear.hear)
        await links.apply(view_of(early))  # returns after one attempt
        assert ear.news == []
        late = ScriptedWorker(run_dir, "both-0")
        await until(lambda: len(ear.news) == 2, "the worker")
        await links.close()
        late.die()

    run(scenario())


def test_the_next_life_replaces_the_last(run_dir: Path) -> None:
    async def scenario() -> None:
        first, second, ear = ScriptedWorker(run_dir, "w"), ScriptedWorker(run_dir, "w", incarnation=2), Ear()
        links = FrontLinks(SETTINGS, ear.hear)
        await links.apply(view_of(first))
        await until(lambda: len(ear.news) == 2, "the first life")
        await links.apply(view_of(second, epoch=2))
        await until(lambda: len(ear.news) == 5, "the second life")
        assert ear.news[2:4] == [Left("w", "w left the cluster"), Joined("w", "both")]
        first.tell_load(free_blocks=1)
        await links.apply(view_of(first, epoch=1))  # old news
        second.tell_load(free_blocks=2)
        await until(lambda: ear.loads()[-1] == 2, "the second life's load")
        assert 1 not in ear.loads()
        await links.close()
        first.die()
        second.die()

    run(scenario())


def test_an_impostor_is_not_linked(run_dir: Path) -> None:
    async def scenario() -> None:
        worker, ear = ScriptedWorker(run_dir, "w"), Ear()
        guess = dataclasses.replace(SETTINGS, secret=b"not the secret of this cluster..")
        stranger = FrontLinks(guess, ear.hear)
        await stranger.apply(view_of(worker))
        other_life = dataclasses.replace(worker.info, incarnation=9)
        links = FrontLinks(SETTINGS, ear.hear)
        await links.apply(dataclasses.replace(view_of(worker), workers=(other_life,)))
        assert links.send("w", Kind.CANCEL, b"") == "no link to w"
        assert ear.news == []
        await stranger.close()
        await links.close()
        worker.die()

    run(scenario())


def test_closing_while_dialling_leaves_nothing_behind(run_dir: Path) -> None:
    async def scenario() -> None:
        worker, ear = ScriptedWorker(run_dir, "w"), Ear()
        links = FrontLinks(SETTINGS, ear.hear)
        applying = asyncio.create_task(links.apply(view_of(worker)))
        await asyncio.sleep(0)
        await links.close()
        await applying
        assert ear.news == []
        worker.die()

    run(scenario())


def test_a_link_that_is_made_when_nobody_waits_any_more_is_hung_up(run_dir: Path) -> None:
    path, hello = str(run_dir / "w.1"), Hello("w", "both", 1, host_id())
    is_dialed, is_over = threading.Event(), threading.Event()

    def answer(listening: socket.socket) -> bytes:
        """Ends the handshake only when the front end's loop is over."""
        sock, _ = listening.accept()
        is_dialed.set()
        with sock:
            assert is_over.wait(WAIT_S)
            welcome(sock, hello, SECRET, time.monotonic() + WAIT_S)
            sock.settimeout(WAIT_S)
            return sock.recv(1)

    async def see_the_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            is_over.set()

    async def scenario() -> None:
        worker = WorkerInfo("w", "both", 1, host_id(), path, "", 0, 0, "node")
        links = FrontLinks(dataclasses.replace(SETTINGS, link_timeout_s=2 * WAIT_S), Ear().hear)
        applying = asyncio.create_task(links.apply(ClusterView(1, (worker,), None)))
        assert await asyncio.to_thread(is_dialed.wait, WAIT_S)
        await links.close()
        await applying
        asyncio.create_task(see_the_end())  # noqa: RUF006 - cancelled with all that is left
        await asyncio.sleep(0)

    with bind_unix(path) as listening, ThreadPoolExecutor(1) as pool:
        heard = pool.submit(answer, listening)
        run(scenario())
        assert heard.result() == b""


def test_links_that_cannot_be_polled_are_lost_aloud(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(timeout_s: float | None) -> list[Event]:
        raise OSError("out of luck")

    async def scenario() -> None:
        worker, ear = ScriptedWorker(run_dir, "w"), Ear()
        links = FrontLinks(SETTINGS, ear.hear)
        await links.apply(view_of(worker))
        await until(lambda: len(ear.news) == 2, "the worker")
        monkeypatch.setattr(links._reactor, "poll", fail)
        links._reactor.wake()
        await until(lambda: len(ear.news) == 3, "the loss")
        assert ear.news[-1] == Left("w", "the front end cannot poll its links")
        await links.close()
        worker.die()

    run(scenario())
