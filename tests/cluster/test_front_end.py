from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from scripted_worker import ScriptedWorker, front_of, run, until, view_of

from braid.actors.messages import Submit, TokenItem
from braid.cluster.front_end import FrontEnd
from braid.cluster.request import Delta, GenerateRequest, RequestRefused, Usage
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

PROMPT = tuple(range(65, 65 + 10))
BUSY = {"code": "busy", "message": "no room"}


def ask(max_tokens: int = 20, prompt: tuple[int, ...] = PROMPT, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_tokens=max_tokens, seed=7), **more)


async def gather(front: FrontEnd, request: GenerateRequest) -> list[Delta]:
    return [delta async for delta in front.generate(request)]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def submitted(worker: ScriptedWorker) -> Submit:
    return await asyncio.to_thread(worker.next_submit)


async def cancelled(worker: ScriptedWorker) -> str:
    return await asyncio.to_thread(worker.next_cancel)


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


# ---- workers die


def test_a_death_fails_exactly_the_requests_it_concerns(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        prefill = [ScriptedWorker(run_dir, f"prefill-{place}", "prefill") for place in range(2)]
        decode = [ScriptedWorker(run_dir, f"decode-{place}", "decode") for place in range(2)]
        async with front_of(byte_tokenizer, *prefill, *decode) as front:
            # alternating placement: (p0, d0) prefilled, (p1, d1) prefilled, (p0, d0) and (p1, d1) not yet
            answers = [asyncio.create_task(gather(front, ask(max_tokens=100 + place))) for place in range(4)]
            submits = [await submitted(prefill[place % 2]) for place in range(4)]
            assert [submit.decode for submit in submits] == ["decode-0", "decode-1"] * 2
            for place in (0, 1):
                prefill[place].say(TokenItem(submits[place].id, 0, [*b"a"]))
            await until(lambda: sum(flight.first_token_ns > 0 for flight in front._flights.values()) == 2, "tokens")
            prefill[0].die()
            with pytest.raises(RequestRefused, match="prefill worker prefill-0 was lost") as refused:
                await answers[2]
            assert refused.value.code == "unavailable"
            assert await cancelled(decode[0]) == submits[2].id
            decode[1].die()
            for place in (1, 3):
                with pytest.raises(RequestRefused, match="decode worker decode-1 was lost"):
                    await answers[place]
            assert await cancelled(prefill[1]) == submits[3].id
            decode[0].say(TokenItem(submits[0].id, 1, [*b"b"], finish="length"))
            assert text_of(await answers[0]) == "ab"

    run(scenario())


def test_nobody_waits_for_room_that_went_with_a_worker(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        big = ScriptedWorker(run_dir, "both-0", total_blocks=8, free_blocks=0)
        small = ScriptedWorker(run_dir, "both-1", total_blocks=2, free_blocks=0)
        async with front_of(byte_tokenizer, big, small) as front:
            large = asyncio.create_task(gather(front, ask(prompt=(5,) * 200)))  # the first in the queue
            short = asyncio.create_task(gather(front, ask()))
            await until(lambda: front.load()["waiting"] == 2, "two waiting")
            big.die()
            with pytest.raises(
                RequestRefused, match=r"(200|219) tokens, the largest (prefill|decode) worker has room for 128"
            ) as refused:
                await large
            assert (refused.value.code, refused.value.retry_after_s) == ("unavailable", 1.0)
            small.tell_load(free_blocks=2)
            submit = await submitted(small)
            small.say(TokenItem(submit.id, 0, [*b"a"], finish="length"), free_blocks=0)
            assert text_of(await short) == "a"
            last = asyncio.create_task(gather(front, ask()))
            await until(lambda: front.load()["waiting"] == 1, "one waiting")
            small.die()
            with pytest.raises(RequestRefused, match="no prefill or no decode worker is linked"):
                await last

    run(scenario())


def test_tokens_before_a_death_still_reach_the_caller(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with front_of(byte_tokenizer, worker) as front:
            deltas = front.generate(ask())
            first = asyncio.ensure_future(anext(deltas))
            submit = await submitted(worker)
            worker.say(TokenItem(submit.id, 0, [*b"a"]))
            assert (await first).text == "a"
            worker.say(TokenItem(submit.id, 1, [*b"b"]))
            worker.die()
            await until(lambda: not front.ready, "the death")
            assert (await anext(deltas)).text == "b"
            with pytest.raises(RequestRefused, match="both-0 was lost"):
                await anext(deltas)

    run(scenario())


def test_an_unreadable_message_costs_that_link_only(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        workers = [ScriptedWorker(run_dir, f"both-{place}") for place in range(2)]
        async with front_of(byte_tokenizer, *workers) as front:
            answers = [asyncio.create_task(gather(front, ask())) for _ in workers]
            submits = [await submitted(worker) for worker in workers]
            workers[0].garble()
            with pytest.raises(RequestRefused, match="cannot be read"):
                await answers[0]
            workers[1].say(TokenItem(submits[1].id, 0, [*b"a"], finish="length"))
            assert text_of(await answers[1]) == "a"

    run(scenario())


def test_output_that_makes_no_sense_fails_its_own_request(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with front_of(byte_tokenizer, worker) as front:
            answers = [asyncio.create_task(gather(front, ask(max_tokens=5 + place))) for place in range(2)]
            submits = [await submitted(worker) for _ in answers]
            wrong = TokenItem(submits[0].id, 0, [1, 2], logprobs=[[0.0, []]])
            worker.say(wrong, TokenItem(submits[1].id, 0, [*b"a"], finish="length"))
            with pytest.raises(RequestRefused, match="1 logprobs for 2 tokens") as refused:
                await answers[0]
            assert refused.value.code == "internal"
            assert text_of(await answers[1]) == "a"

    run(scenario())


# ---- room


def test_waits_in_order_until_a_decode_worker_has_room(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0", total_blocks=2, free_blocks=2)
        async with front_of(byte_tokenizer, worker) as front:
            big = asyncio.create_task(gather(front, ask(prompt=(5,) * 64, max_tokens=20)))  # both blocks
            first = await submitted(worker)
            later = [asyncio.create_task(gather(front, ask(max_tokens=10 + place))) for place in range(2)]
            await until(lambda: front.load()["waiting"] == 2, "two waiting")
            worker.say(TokenItem(first.id, 0, [*b"a"], finish="length"), free_blocks=2)
            assert text_of(await big) == "a"
            submits = [await submitted(worker) for _ in later]
            assert [submit.params["max_tokens"] for submit in submits] == [10, 11]
            for submit in submits:
                worker.say(TokenItem(submit.id, 0, [*b"b"], finish="length"))
            assert [text_of(await answer) for answer in later] == ["b", "b"]

    run(scenario())


def test_who_floods_the_queue_is_the_one_to_be_refused(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0", free_blocks=0)
        async with front_of(byte_tokenizer, worker, max_waiting=2) as front:
            flood = [asyncio.create_task(gather(front, ask(max_tokens=5, caller="a", priority=3))) for _ in range(2)]
            await until(lambda: front.load()["waiting"] == 2, "two waiting")
            other = asyncio.create_task(gather(front, ask(max_tokens=6, caller="b", priority=3)))
            with pytest.raises(RequestRefused, match="2 requests wait already"):
                await flood[1]
            worker.tell_load(free_blocks=64)
            submits = [await submitted(worker) for _ in range(2)]
            assert [(submit.caller, submit.priority) for submit in submits] == [("a", 3), ("b", 3)]
            worker.say(*[TokenItem(submit.id, 0, [*b"x"], finish="length") for submit in submits])
            assert [text_of(await answer) for answer in (flood[0], other)] == ["x", "x"]

    run(scenario())


def test_a_full_queue_answers_busy_at_once(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0", free_blocks=0)
        async with front_of(byte_tokenizer, worker, max_waiting=1) as front:
            with pytest.raises(RequestRefused, match="passed in the queue"):
                await gather(front, ask(timeout_s=0.2))
            waiting = asyncio.create_task(gather(front, ask()))
            await until(lambda: front.load()["waiting"] == 1, "one waiting")
            with pytest.raises(RequestRefused, match="1 requests wait already") as refused:
                await gather(front, ask())
            assert (refused.value.code, refused.value.retry_after_s) == ("busy", 1.0)
            assert worker.submits.empty()
            waiting.cancel()
            await asyncio.wait([waiting])

    run(scenario())


def test_busy_before_the_first_token_waits_again(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with front_of(byte_tokenizer, worker) as front:
            answer = asyncio.create_task(gather(front, ask()))
            attempts = [await submitted(worker)]
            for _ in range(3):
                worker.say(TokenItem(attempts[-1].id, finish="error", error=BUSY))
                attempts.append(await submitted(worker))
            *earlier, last = [submit.id for submit in attempts]
            assert last not in earlier
            worker.say(TokenItem(earlier[0], 0, [*b"old"]), TokenItem(last, 0, [*b"new"], finish="length"))
            assert text_of(await answer) == "new"

    run(scenario())


def test_a_worker_that_stays_busy_is_not_asked_all_the_time(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        worker.answer = lambda submit: [TokenItem(submit.id, finish="error", error=BUSY)]
        async with front_of(byte_tokenizer, worker) as front:
            with pytest.raises(RequestRefused, match="deadline"):
                await gather(front, ask(timeout_s=0.8))
            assert worker.submits.qsize() < 20

    run(scenario())


def test_error_items_are_answers(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        prefill, decode = ScriptedWorker(run_dir, "prefill-0", "prefill"), ScriptedWorker(run_dir, "decode-0", "decode")
        async with front_of(byte_tokenizer, prefill, decode) as front:
            for code, expected in [("unavailable", "unavailable"), ("internal", "internal"), ("odd", "internal")]:
                answer = asyncio.create_task(gather(front, ask()))
                submit = await submitted(prefill)
                prefill.say(
                    TokenItem(submit.id, 0, finish="error", error={"code": code, "message": "expert 3 is gone"})
                )
                with pytest.raises(RequestRefused, match="expert 3 is gone") as refused:
                    await answer
                assert refused.value.code == expected
                assert await cancelled(decode) == submit.id
            assert prefill.cancels.empty()

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
