"""What becomes of requests when workers die, or have no room: each waits, goes on or is refused by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from scripted_worker import ScriptedWorker, ask, cancelled, front_of, gather, run, submitted, text_of, until

from braid.actors.messages import Submit, TokenItem
from braid.cluster.request import RequestRefused
from braid.model.tokenizer import Tokenizer

BUSY = {"code": "busy", "message": "no room"}


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


def test_who_says_busy_rests_and_nobody_else(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    """Of two decode workers the one with more room refuses: the prefill worker goes on, with the other one."""

    def answer(submit: Submit) -> list[TokenItem]:
        if submit.decode == "decode-0":
            return [TokenItem(submit.id, finish="error", error={**BUSY, "by": "decode-0"})]
        return [TokenItem(submit.id, 0, [*b"a"], finish="length")]

    async def scenario() -> None:
        prefill = ScriptedWorker(run_dir, "prefill-0", "prefill")
        decode = [ScriptedWorker(run_dir, f"decode-{place}", "decode", free_blocks=64 - place) for place in range(2)]
        prefill.answer = answer
        async with front_of(byte_tokenizer, prefill, *decode) as front:
            assert text_of(await gather(front, ask(timeout_s=60.0))) == "a"
            assert (await submitted(prefill)).decode == "decode-0"

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
