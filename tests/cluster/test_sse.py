"""Events survive any client's line splitting; whoever ends a stream, its source is closed."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from braid.cluster.sse import ClientGone, EventStream, event, unless_disconnected


class Source:
    """Chunks, and whether they were closed. Waits for ever after the last one if told to."""

    def __init__(self, count: int, is_endless: bool = False) -> None:
        self.count, self.is_endless, self.is_closed = count, is_endless, False

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            for number in range(self.count):
                yield {"number": number}
            if self.is_endless:
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # freeing may take a step of the loop
            self.is_closed = True


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def test_no_unicode_line_end_is_left_in_an_event() -> None:
    body = {"text": "a\x85b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1ee\r\n 😀"}
    sent = event(body)
    assert len(sent.decode().removesuffix("\n\n").splitlines()) == 1
    assert json.loads(sent.removeprefix(b"data: ")) == body
    assert "😀".encode() in sent


@pytest.mark.parametrize("is_endless", [False, True])
def test_a_whole_stream_and_one_cut_by_the_client(is_endless: bool) -> None:
    source, sent = Source(2, is_endless), []
    all_sent = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:
            all_sent.set()

    async def receive() -> dict[str, Any]:
        if is_endless:
            await all_sent.wait()
            return {"type": "http.disconnect"}
        return await never()

    asyncio.run(EventStream(source.chunks())({"type": "http"}, receive, send))
    assert source.is_closed
    assert (b"cache-control", b"no-cache") in sent[0]["headers"]
    assert [message["body"] for message in sent[1:3]] == [b'data: {"number":0}\n\n', b'data: {"number":1}\n\n']
    rest = [] if is_endless else [b"data: [DONE]\n\n", b""]
    assert [message["body"] for message in sent[3:]] == rest


@pytest.mark.parametrize("fault", ["blocks", "fails"])
def test_a_client_that_stops_reading_is_gone(fault: str) -> None:
    source = Source(3)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            if fault == "fails":
                raise OSError("closed")
            await asyncio.Event().wait()

    asyncio.run(EventStream(source.chunks(), send_timeout_s=0.01)({"type": "http"}, never, send))
    assert source.is_closed


def test_cancelling_the_server_s_task_closes_the_source() -> None:
    source = Source(1, is_endless=True)

    async def scenario() -> None:
        begun = asyncio.Event()

        async def send(message: Any) -> None:
            begun.set()

        task = asyncio.ensure_future(EventStream(source.chunks())({"type": "http"}, never, send))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert source.is_closed


def test_work_is_cancelled_and_awaited_when_the_client_leaves() -> None:
    ended: list[str] = []

    async def work() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("work")
        return 1

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def done() -> int:
        return 7

    with pytest.raises(ClientGone):
        asyncio.run(unless_disconnected(gone, work()))
    assert ended == ["work"]
    assert asyncio.run(unless_disconnected(never, done())) == 7
