"""Runs the sequences of one HTTP request at once and makes one answer, or one stream of chunks, of their deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from ..model.tokenizer import Tokenizer
from .http_shapes import Piece, Shape
from .request import Delta, GenerateRequest, Usage
from .sse import dump

MAX_PARALLEL = 64  # sequences of one HTTP request that run at once: it must not fill the queue alone
_MARK = "\0"  # stands for the text; no name of a model holds it
_QUEUE = 64  # deltas waiting for a slow reader; then its sequences wait too


class Front(Protocol):
    """What HTTP needs of the front end core."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def ready(self) -> bool: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]: ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request, understood. Choice i of prompt p is `requests[p * n + i]`."""

    id: str
    created: int
    model: str
    requests: Sequence[GenerateRequest]
    n: int
    shape: Shape
    include_usage: bool = False

    def envelope(self, name: str, choices: Sequence[Piece], more: Mapping[str, Any]) -> dict[str, Any]:
        head = {"id": self.id, "object": name, "created": self.created, "model": self.model}
        return {**head, "choices": list(choices), **more}


async def merged(front: Front, requests: Sequence[GenerateRequest]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of all requests as they come, with the request's index. The first failure ends all; so does closing."""
    if len(requests) == 1:
        async with aclosing(front.generate(requests[0])) as only:
            async for delta in only:
                yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue(_QUEUE)
    news = asyncio.Event()
    turns = asyncio.Semaphore(MAX_PARALLEL)

    async def pump(index: int) -> None:
        # one task reads one iterator from beginning to end: what it holds may belong to the task
        async with turns, aclosing(front.generate(requests[index])) as deltas:
            async for delta in deltas:
                await arrived.put((index, delta))
                news.set()

    pumps = [asyncio.ensure_future(pump(index)) for index in range(len(requests))]
    ended = asyncio.gather(*pumps)
    ended.add_done_callback(lambda _: news.set())
    try:
        while True:
            news.clear()
            while not arrived.empty():
                yield arrived.get_nowait()
            if ended.done():
                ended.result()  # raises what ended it
                return
            await news.wait()  # the front end's deadline for each request bounds it
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(ended, *pumps, return_exceptions=True)


async def whole(front: Front, exchange: Exchange) -> dict[str, Any]:
    shape = exchange.shape
    pieces: list[list[Piece]] = [[] for _ in exchange.requests]
    usages: dict[int, Usage] = {}
    async with aclosing(merged(front, exchange.requests)) as deltas:
        async for index, delta in deltas:
            pieces[index] += shape.pieces(index, delta)
            if delta.usage is not None:
                usages[index] = delta.usage
    choices = [shape.whole(index, parts) for index, parts in enumerate(pieces)]
    more = {"usage": _usage(usages, exchange.n), **shape.top_level()}
    return exchange.envelope(shape.object_name, choices, more)


class PlainChunks:
    """Most chunks differ in their text only: all the rest is encoded once for each choice."""

    def __init__(self, exchange: Exchange, more: Mapping[str, Any]) -> None:
        self._exchange = exchange
        self._more = more
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def encode(self, index: int, text: str) -> bytes:
        if index not in self._around:
            shape = self._exchange.shape
            piece = shape.plain_piece(index, _MARK)
            head, tail = dump(self._exchange.envelope(shape.chunk_name, [piece], self._more)).split(dump(_MARK))
            self._around[index] = head, tail
        head, tail = self._around[index]
        return head + dump(text) + tail


async def chunks(front: Front, exchange: Exchange) -> AsyncGenerator[dict[str, Any] | bytes, None]:
    """Chunks of a stream, some as JSON already."""
    shape = exchange.shape
    first: Mapping[str, Any] = shape.top_level()
    nothing_yet: Mapping[str, Any] = {"usage": None} if exchange.include_usage else {}
    plain = PlainChunks(exchange, nothing_yet)
    usages: dict[int, Usage] = {}
    async with aclosing(merged(front, exchange.requests)) as deltas:
        async for index, delta in deltas:
            if shape.is_plain(index, delta):
                if delta.text:
                    yield plain.encode(index, delta.text)
                continue
            for piece in shape.pieces(index, delta):
                yield exchange.envelope(shape.chunk_name, [piece], {**nothing_yet, **first})
                first = {}
            if delta.usage is not None:
                usages[index] = delta.usage
    if exchange.include_usage:
        yield exchange.envelope(shape.chunk_name, [], {"usage": _usage(usages, exchange.n)})


def _usage(usages: Mapping[int, Usage], n: int) -> dict[str, Any]:
    """A prompt counts once however many choices are made of it."""
    prompt = sum(usage.prompt_tokens for index, usage in usages.items() if index % n == 0)
    completion = sum(usage.completion_tokens for usage in usages.values())
    cached = sum(usage.cached_tokens for index, usage in usages.items() if index % n == 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(usage.accepted_prediction_tokens for usage in usages.values()),
            "rejected_prediction_tokens": sum(usage.rejected_prediction_tokens for usage in usages.values()),
        },
    }
