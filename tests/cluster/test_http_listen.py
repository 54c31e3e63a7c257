from __future__ import annotations

import asyncio
import socket

import pytest
from scripted_worker import run
from starlette.types import Receive, Scope, Send

from braid.cluster import http_listen
from braid.cluster.http_listen import HttpListener
from braid.cluster.ports import free_ports


async def slow_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in two parts; the second one when the listener has been asked to stop."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"ab", "more_body": True})
    await asyncio.sleep(0.2)
    await send({"type": "http.response.body", "body": b"cd"})


def test_answers_from_the_start_and_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listen, "GRACE_S", 20)

    async def scenario() -> None:
        (port,) = free_ports(1)
        listener = HttpListener(slow_answer, "127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"ab")
        await listener.stop()
        rest = await reader.read()
        writer.close()
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection("127.0.0.1", port)
        assert (head + rest).endswith(b"abcd")

    run(scenario())


def test_an_idle_connection_outlasts_those_who_reuse_it() -> None:
    async def scenario() -> None:
        (port,) = free_ports(1)
        listener = HttpListener(slow_answer, "127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"abcd")
        writer.close()
        await listener.stop()

    assert http_listen.IDLE_S > 60
    run(scenario())


def test_an_idle_connection_ends_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listen, "IDLE_S", 1)

    async def scenario() -> None:
        (port,) = free_ports(1)
        listener = HttpListener(slow_answer, "127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"abcd")
        assert await reader.read() == b""
        writer.close()
        await listener.stop()

    run(scenario())


def test_says_which_port_cannot_be_had() -> None:
    async def scenario() -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as taken,
            pytest.raises(ValueError, match=f"127.0.0.1:{taken.getsockname()[1]}.*choose another http_port"),
        ):
            HttpListener(slow_answer, "127.0.0.1", taken.getsockname()[1])

    run(scenario())
