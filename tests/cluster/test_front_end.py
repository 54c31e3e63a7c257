from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path

import pytest
from scripted_worker import (
    PROMPT,
    ScriptedWorker,
    ask,
    cancelled,
    front_of,
    gather,
    run,
    submitted,
    text_of,
    until,
    view_of,
)

from braid.actors.messages import Submit, TokenItem
from braid.cluster.request import GenerateRequest, RequestRefused, Usage
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer


def echo(submit: Submit) -> list[TokenItem]:
    """Says the prompt again, in two pieces, and ends."""
    half = len(submit.prompt) // 2
    rest = TokenItem(submit.id, half, submit.prompt[half:], finish="length")
    return [TokenItem(submit.id, 0, submit.prompt[:half]), rest]


# ---- streams over links


def test_submits_to_prefill_and_orders_what_two_workers_send(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        prefill, decode = ScriptedWorker(run_dir, "prefill-0", "prefill"), ScriptedWorker(run_dir, "decode-0", "decode")
        async with front_of(byte_tokenizer, prefill, decode) as front:
            answer = asyncio.create_task(gather(front, ask(carrier={"traceparent": TRACEPARENT})))
            submit = await submitted(prefill)
            assert (submit.prompt, submit.decode, submit.front) == ([*PROMPT], "decode-0", "front-0")
            assert SamplingParams.from_wire(submit.params) == ask().params
            assert submit.carrier["traceparent"].split("-")[1] == TRACEPARENT.split("-")[1]
            assert 590 < submit.deadline - time.time() <= 600
            decode.say(TokenItem(submit.id, 2, [*b"c"], finish="length"))
            decode.say(TokenItem(submit.id, 1, [*b"b"]))
            prefill.say(TokenItem(submit.id, 0, [*b"a"], cached=4))
            deltas = await answer
            assert text_of(deltas) == "abc"
            assert (deltas[-1].finish_reason, deltas[-1].usage) == ("length", Usage(10, 3, 4))
            assert decode.cancels.empty()

    run(scenario())


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_stop_string_over_tokens_ends_the_sequence_on_its_worker(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        prefill, decode = ScriptedWorker(run_dir, "prefill-0", "prefill"), ScriptedWorker(run_dir, "decode-0", "decode")
        async with front_of(byte_tokenizer, prefill, decode) as front:
            answer = asyncio.create_task(gather(front, ask(stop=("END",))))
            submit = await submitted(prefill)
            prefill.say(TokenItem(submit.id, 0, [*b"x"]))
            for place, byte in enumerate(b"yENDz", start=1):
                decode.say(TokenItem(submit.id, place, [byte]))
            deltas = await answer
            assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("xy", "stop", "END")
            assert deltas[-1].usage == Usage(10, 5)
            assert await cancelled(decode) == submit.id
            assert prefill.cancels.empty()

    run(scenario())


def test_many_at_once_each_gets_its_own(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        workers = [ScriptedWorker(run_dir, f"both-{place}") for place in range(2)]
        for worker in workers:
            worker.answer = echo
        prompts = [tuple(f"prompt number {number:03}".encode()) for number in range(100)]
        async with front_of(byte_tokenizer, *workers) as front:
            answers = await asyncio.gather(*(gather(front, ask(prompt=prompt)) for prompt in prompts))
            assert [text_of(deltas) for deltas in answers] == [bytes(prompt).decode() for prompt in prompts]
            assert all(worker.submits.qsize() > 10 for worker in workers)

    run(scenario())


def test_a_single_token_needs_no_decode_worker(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        prefill = ScriptedWorker(run_dir, "prefill-0", "prefill")
        decode = ScriptedWorker(run_dir, "decode-0", "decode", free_blocks=0)
        async with front_of(byte_tokenizer, prefill, decode) as front:
            answer = asyncio.create_task(gather(front, ask(max_tokens=1)))
            submit = await submitted(prefill)
            assert submit.decode == "prefill-0"
            prefill.say(TokenItem(submit.id, 0, [*b"a"], finish="length"))
            assert text_of(await answer) == "a"

    run(scenario())


# ---- the caller goes


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_a_caller_that_goes_frees_both_workers(run_dir: Path, byte_tokenizer: Tokenizer, way: str) -> None:
    async def scenario() -> None:
        prefill, decode = ScriptedWorker(run_dir, "prefill-0", "prefill"), ScriptedWorker(run_dir, "decode-0", "decode")
        async with front_of(byte_tokenizer, prefill, decode) as front:
            if way == "cancel":
                answer = asyncio.create_task(gather(front, ask()))
                submit = await submitted(prefill)
                answer.cancel()
                await asyncio.wait([answer])
                assert await cancelled(prefill) == submit.id
            else:
                async with aclosing(front.generate(ask())) as deltas:
                    first = asyncio.ensure_future(anext(deltas))
                    submit = await submitted(prefill)
                    prefill.say(TokenItem(submit.id, 0, [*b"a"]))
                    assert (await first).text == "a"
                assert prefill.cancels.empty()  # it has handed the sequence over
            assert await cancelled(decode) == submit.id
            decode.say(TokenItem(submit.id, 1, [*b"late"]))

    run(scenario())


def test_the_deadline_ends_it_on_the_workers_too(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with front_of(byte_tokenizer, worker) as front:
            with pytest.raises(RequestRefused, match=r"deadline of 0\.2 s passed after 0 tokens") as refused:
                await gather(front, ask(timeout_s=0.2))
            assert refused.value.code == "deadline"
            assert await cancelled(worker) == (await submitted(worker)).id

    run(scenario())


# ---- bad requests


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (ask(prompt=()), "prompt is empty"),
        (ask(prompt=(257,)), "token id 257 in the prompt: use 0 to 256"),
        (ask(prompt=(-1,)), "token id -1"),
        (ask(max_tokens=4087), "prompt of 10 tokens and max_tokens 4087 exceed the context of 4096"),
        (ask(max_tokens=200, prompt=(1,) * 3000), "needs KV cache for 3199 tokens.* room for 2048"),
        (ask(stop=("",)), "empty string"),
        (GenerateRequest(PROMPT, SamplingParams(max_tokens=1, temperature=-1.0)), "temperature is -1.0"),
    ],
)
def test_bad_requests_are_told_why(
    run_dir: Path, byte_tokenizer: Tokenizer, request_: GenerateRequest, told: str
) -> None:
    async def scenario() -> None:
        prefill = ScriptedWorker(run_dir, "prefill-0", "prefill", total_blocks=64)
        decode = ScriptedWorker(run_dir, "decode-0", "decode", total_blocks=32, free_blocks=32)
        async with front_of(byte_tokenizer, prefill, decode) as front:
            with pytest.raises(RequestRefused, match=told) as refused:
                await gather(front, request_)
            assert refused.value.code == "invalid"
            assert b'braid_requests_total{finish="invalid"} 1.0' in front.metrics.render()

    run(scenario())


def test_without_workers_it_is_unavailable_and_not_ready(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        prefill = ScriptedWorker(run_dir, "prefill-0", "prefill")
        async with front_of(byte_tokenizer, prefill) as front:
            told: list[bool] = []
            unwatch = front.watch_ready(told.append)
            with pytest.raises(RequestRefused, match="no prefill or no decode worker") as refused:
                await gather(front, ask())
            assert (refused.value.code, refused.value.retry_after_s) == ("unavailable", 1.0)
            decode = ScriptedWorker(run_dir, "decode-0", "decode")
            await front.apply(view_of(prefill, decode, epoch=2))
            await until(lambda: front.ready, "the decode worker")
            decode.die()
            await until(lambda: not front.ready, "its death")
            unwatch()
            assert told == [False, True, False]

    run(scenario())


def test_closing_answers_what_is_open(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0", total_blocks=1, free_blocks=1)
        async with front_of(byte_tokenizer, worker) as front:
            answers = [asyncio.create_task(gather(front, ask())) for _ in range(2)]
            submit = await submitted(worker)
            await front.close()
            for answer in answers:
                with pytest.raises(RequestRefused, match="is closing"):
                    await answer
            assert await cancelled(worker) == submit.id
            with pytest.raises(RequestRefused, match="no prefill"):
                await gather(front, ask())

    run(scenario())
