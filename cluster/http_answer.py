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

MAX_PARALLEL = 64  # sequences of one HTTP request that run at once: it must not fill the queue alone
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


async def chunks(front: Front, exchange: Exchange) -> AsyncGenerator[dict[str, Any], None]:
    shape = exchange.shape
    first: Mapping[str, Any] = shape.top_level()
    nothing_yet: Mapping[str, Any] = {"usage": None} if exchange.include_usage else {}
    usages: dict[int, Usage] = {}
    async with aclosing(merged(front, exchange.requests)) as deltas:
        async for index, delta in deltas:
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
    }
