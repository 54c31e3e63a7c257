"""The front end against real engines in real processes: tokens, cancellation and death over the whole path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager

import pytest
from generators import make_hf_model, save_hf_model
from processes import SECRET, ProcessCluster
from scripted_worker import run, until

from braid.cluster.front_end import FrontEnd
from braid.cluster.request import Delta, FrontEndSettings, GenerateRequest, RequestRefused
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

CONTEXT = 4096
LENGTHS = (1, 63, 64, 130, 1500)
PROMPTS = [tuple((7 * i * j + 3 * i + j) % 150 + 3 for j in range(length)) for i, length in enumerate(LENGTHS)]
LONG = 3900  # tokens: seconds of work, so that who is stopped for a while still finds it under way


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model, _ = make_hf_model("v3", seed=11, max_position_embeddings=CONTEXT, rope_parameters=rope)
    checkpoint = save_hf_model(model, tmp_path_factory.mktemp("checkpoint"))
    run_dir = tmp_path_factory.mktemp("run")
    made = ProcessCluster(checkpoint, run_dir, decode=2, experts="colocated", kv_tokens=CONTEXT)
    yield made
    made.front.close()
    for name, worker in made.workers.items():
        if name != "decode-1":  # killed by the last test
            worker.close()


@asynccontextmanager
async def front_over(cluster: ProcessCluster, tokenizer: Tokenizer) -> AsyncIterator[FrontEnd]:
    settings = FrontEndSettings("front-1", SECRET, "tiny", cluster.config.vocab_size, max_model_len=CONTEXT)
    front = FrontEnd(settings, tokenizer)
    try:
        await front.apply(cluster.view)
        linked = sum(not worker.info or worker.process.is_alive() for worker in cluster.workers.values())
        await until(lambda: len(front.load()["workers"]) == linked, "every worker's load")
        yield front
        await until(lambda: is_idle(front), "all blocks to come back")
    finally:
        await front.close()


def is_idle(front: FrontEnd) -> bool:
    workers = front.load()["workers"]
    return all(load["free_blocks"] == load["total_blocks"] and not load["sequences"] for load in workers)


def counters_of(front: FrontEnd, worker: str) -> dict[str, float]:
    found: dict[str, dict[str, float]] = {load["worker"]: load["counters"] for load in front.load()["workers"]}
    return found[worker]


def ask(prompt: tuple[int, ...], max_tokens: int = 12, seed: int = 5) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True))


async def tokens(front: FrontEnd, request: GenerateRequest) -> list[int]:
    return [token_id async for delta in front.generate(request) for token_id in delta.token_ids]


def test_the_same_tokens_alone_and_with_many_more_than_fit(cluster: ProcessCluster, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with front_over(cluster, byte_tokenizer) as front:
            alone = [await tokens(front, ask(prompt)) for prompt in PROMPTS]
            assert [len(answer) for answer in alone] == [12] * len(PROMPTS)
            # 40 sequences that begin with 256 blocks, over 2 x 64: many of them wait
            together = await asyncio.gather(*(tokens(front, ask(prompt)) for prompt in PROMPTS * 8))
            assert together == alone * 8

    run(scenario())


def test_the_usage_tells_what_of_the_prompt_was_in_the_cache(
    cluster: ProcessCluster, byte_tokenizer: Tokenizer
) -> None:
    async def scenario() -> None:
        async with front_over(cluster, byte_tokenizer) as front:
            told = []
            for own in (9, 9, 10):
                request = ask((*range(3, 103), *[own] * 40))
                usages = [delta.usage async for delta in front.generate(request) if delta.usage is not None]
                told += [usage.cached_tokens for usage in usages]
            assert told == [0, 128, 64]
            # counters come with a report of their own, soon after the tokens
            await until(lambda: counters_of(front, "prefill-0").get("prefix_hit_tokens", 0) >= 192, "the hits")

    run(scenario())


def test_cancelled_at_any_moment_everything_comes_back(cluster: ProcessCluster, byte_tokenizer: Tokenizer) -> None:
    async def cancel_after(front: FrontEnd, prompt: tuple[int, ...], num_deltas: int) -> None:
        async with aclosing(front.generate(ask(prompt, max_tokens=200))) as deltas:
            for _ in range(num_deltas):
                await anext(deltas)

    async def scenario() -> None:
        async with front_over(cluster, byte_tokenizer) as front:
            await asyncio.gather(*(cancel_after(front, PROMPTS[place % 4], place % 5) for place in range(20)))
            tasks = [asyncio.create_task(tokens(front, ask(PROMPTS[3], LONG))) for _ in range(8)]
            for task in tasks:
                await until(lambda: not is_idle(front), "work")
                task.cancel()
            await asyncio.wait(tasks)

    run(scenario())


def test_a_killed_decode_worker_ends_its_requests_and_no_other(
    cluster: ProcessCluster, byte_tokenizer: Tokenizer
) -> None:
    async def scenario() -> None:
        async with front_over(cluster, byte_tokenizer) as front:
            expected = await tokens(front, ask(PROMPTS[2], 150))
            streams = [front.generate(ask(PROMPTS[2], LONG)) for _ in range(4)]
            await until(lambda: is_idle(front) and not is_any_resting(front), "room on both that is told to be equal")
            firsts = await asyncio.gather(*(anext(stream) for stream in streams))  # placed before any of them grows
            begun = [list(delta.token_ids) for delta in firsts]
            flights = list(front._flights.values())
            homes = [flight.ticket.placement.decode for flight in flights if flight.ticket.placement]
            assert sorted(homes) == ["decode-0", "decode-0", "decode-1", "decode-1"]
            await asyncio.to_thread(cluster.workers["decode-1"].kill)
            for place, home in enumerate(homes):
                if home == "decode-1":
                    with pytest.raises(RequestRefused, match="decode worker decode-1 was lost"):
                        await drain(streams[place])
            for place, home in enumerate(homes):
                if home == "decode-0":
                    after_the_death = flights[place].stream.num_tokens + 1
                    wanted = max(after_the_death, len(expected)) - len(begun[place])
                    assert (begun[place] + await drain(streams[place], wanted))[: len(expected)] == expected
                    await streams[place].aclose()

    run(scenario())


def is_any_resting(front: FrontEnd) -> bool:
    """As a decode worker does to which the front end's link was not up yet when the first request came by."""
    return any(worker.paused_until > time.monotonic() for worker in front.admission.workers.values())


async def drain(stream: AsyncIterator[Delta], count: int = LONG) -> list[int]:
    """The next `count` tokens, or all that there are."""
    found: list[int] = []
    while len(found) < count and (delta := await anext(stream, None)) is not None:
        found += delta.token_ids
    return found
