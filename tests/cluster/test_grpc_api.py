from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scripted_worker import ScriptedWorker, front_of, run, submitted, until, view_of

from braid.actors.messages import TokenItem
from braid.cluster import braid_v1_pb2 as pb
from braid.cluster.braid_v1_pb2_grpc import BraidStub
from braid.cluster.front_end import FrontEnd
from braid.cluster.grpc_api import SERVICE, serve_grpc
from braid.cluster.request import ModelInfo
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

INFO = ModelInfo("tiny", 4096, 257, "deepseek_v3", notices=("LICENSE-MODEL: use restrictions",))
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def channel_to(front: FrontEnd, **more: Any) -> AsyncIterator[grpc.aio.Channel]:
    server = await serve_grpc(front, "127.0.0.1", 0, INFO, **more)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel
    finally:
        await server.close(grace_s=0.0)


@asynccontextmanager
async def serving(
    tokenizer: Tokenizer, worker: ScriptedWorker, max_waiting: int = 8, **more: Any
) -> AsyncIterator[Any]:
    async with front_of(tokenizer, worker, max_waiting=max_waiting) as front, channel_to(front, **more) as channel:
        yield BraidStub(channel)


def say(text: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.Sampling(max_tokens=20))


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call was answered")


def test_streams_deltas_and_keeps_the_callers_trace(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with serving(byte_tokenizer, worker) as stub:
            sampling = pb.Sampling(
                max_tokens=5, temperature=0.7, seed=-3, stop=["END"], logprobs=1, stop_token_ids=[66]
            )
            ids = pb.TokenIds(ids=[1, 2])
            request = pb.GenerateRequest(model="tiny", token_ids=ids, sampling=sampling, priority=-1, user="anna")
            call = stub.Generate(request, metadata=[("traceparent", TRACEPARENT)])
            submit = await submitted(worker)
            expected = SamplingParams(5, temperature=0.7, seed=-3, logprobs=1, stop_token_ids=(66,))
            assert SamplingParams.from_wire(submit.params) == expected
            assert (submit.prompt, submit.carrier) == ([1, 2], {"traceparent": TRACEPARENT})
            worker.say(TokenItem(submit.id, 0, [65], logprobs=[[-0.5, [[65, -0.5]]]]))
            first = await call.read()  # arrives before the next token exists
            top = [pb.TopLogprob(token_id=65, logprob=-0.5)]
            logprobs = [pb.TokenLogprob(token_id=65, logprob=-0.5, top=top)]
            assert first == pb.GenerateResponse(text="A", token_ids=[65], logprobs=logprobs)
            worker.say(
                TokenItem(submit.id, 1, [66], logprobs=[[-1.0, []]], finish="stop", cached=1, accepted=1, rejected=2)
            )
            last = await call.read()
            assert (last.text, last.finish_reason, last.stop_token_id) == ("", pb.FINISH_REASON_STOP, 66)
            usage = pb.Usage(prompt_tokens=2, completion_tokens=2, cached_tokens=1)
            usage.accepted_prediction_tokens, usage.rejected_prediction_tokens = 1, 2
            assert last.usage == usage
            assert await call.read() is grpc.aio.EOF
            assert await call.code() == grpc.StatusCode.OK

    run(scenario())


def test_messages_go_through_the_chat_template(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        worker.answer = lambda submit: [TokenItem(submit.id, 0, [*b"ok END"])]
        async with serving(byte_tokenizer, worker) as stub:
            messages = pb.Messages(messages=[pb.Message(role="user", content="hé")])
            request = pb.GenerateRequest(messages=messages, sampling=pb.Sampling(stop=["END"]))
            deltas = [delta async for delta in stub.Generate(request)]
            assert [(delta.text, delta.stop_string) for delta in deltas] == [("ok ", "END")]
            submit = await submitted(worker)
            assert bytes(submit.prompt).decode() == "[user]hé[assistant]"
            assert submit.params["max_tokens"] == 4096 - len(submit.prompt)  # what is left of the context
            assert await asyncio.to_thread(worker.next_cancel) == submit.id

    run(scenario())


def test_prompt_logprobs_alone(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        scored: list[Any] = [None, [-2.0, [[9, -1.0]]]]
        worker.answer = lambda submit: [TokenItem(submit.id, prompt_logprobs=scored, finish="length")]
        async with serving(byte_tokenizer, worker) as stub:
            request = pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=0, prompt_logprobs=1))
            (delta,) = [delta async for delta in stub.Generate(request)]
            assert [entry.token_id for entry in delta.prompt_logprobs] == [*b"ab"]
            assert [entry.HasField("logprob") for entry in delta.prompt_logprobs] == [False, True]
            assert delta.finish_reason == pb.FINISH_REASON_LENGTH

    run(scenario())


@pytest.mark.parametrize("way", ["cancel", "deadline", "gone"])
def test_a_caller_that_goes_frees_the_blocks(run_dir: Path, byte_tokenizer: Tokenizer, way: str) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with front_of(byte_tokenizer, worker) as front:
            async with channel_to(front) as channel:
                call = BraidStub(channel).Generate(say("x"), timeout=5.0 if way == "deadline" else None)
                submit = await submitted(worker)
                worker.say(TokenItem(submit.id, 0, [65]))
                assert (await call.read()).text == "A"
                if way == "cancel":
                    call.cancel()
                elif way == "gone":
                    await channel.close(None)
                else:
                    assert submit.deadline - time.time() < 5.0
                    assert (await refusal(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
                assert await asyncio.to_thread(worker.next_cancel) == submit.id
            await until(lambda: front.load()["running"] == 0, "the end of the request")

    run(scenario())


@pytest.mark.parametrize(
    ("request_", "code", "told"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "set text, messages or token_ids"),
        (say(""), "INVALID_ARGUMENT", "prompt is empty"),
        (pb.GenerateRequest(messages=pb.Messages()), "INVALID_ARGUMENT", "messages is empty"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(stop=["x"] * 17)), "INVALID_ARGUMENT", "use at most 16"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[257])), "INVALID_ARGUMENT", "token id 257"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(temperature=-1)), "INVALID_ARGUMENT", "temperature is -1.0"),
        (pb.GenerateRequest(text="x", sampling=pb.Sampling(max_tokens=0)), "INVALID_ARGUMENT", "max_tokens is 0"),
        (pb.GenerateRequest(text="x" * 5000), "INVALID_ARGUMENT", "the context is 4096: shorten the prompt"),
        (pb.GenerateRequest(text="x", model="huge"), "NOT_FOUND", "no model 'huge' here: this cluster serves 'tiny'"),
        (say("x" * 9999), "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
def test_bad_input_is_told_why(
    run_dir: Path, byte_tokenizer: Tokenizer, request_: pb.GenerateRequest, code: str, told: str
) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with serving(byte_tokenizer, worker, max_message_bytes=8000) as stub:
            error = await refusal(stub.Generate(request_))
            assert error.code().name == code
            assert told in (error.details() or "")
            assert worker.submits.empty()

    run(scenario())


@pytest.mark.parametrize(
    ("message", "told"), [(b"\x1a\x02\xff\xfe", "bad UTF-8"), (b"\xff\xff\xff", "type 'braid.v1.GenerateRequest'")]
)
def test_bytes_that_are_no_request(byte_tokenizer: Tokenizer, message: bytes, told: str) -> None:
    async def scenario() -> None:
        async with front_of(byte_tokenizer) as front, channel_to(front) as channel:
            generate: Any = channel.unary_stream(f"/{SERVICE}/Generate")
            error = await refusal(generate(message))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert told in (error.details() or "")
            ask: Any = channel.unary_unary(f"/{SERVICE}/GetModelInfo", response_deserializer=pb.ModelInfo.FromString)
            assert (await ask(message)).name == "tiny", "nothing of the question is read, so nothing can be wrong"

    run(scenario())


def test_without_a_tokenizer_there_is_no_text_to_send_or_to_stop_in(tmp_path: Path) -> None:
    ids = pb.TokenIds(ids=[5, 6])

    async def scenario() -> None:
        async with front_of(Tokenizer(tmp_path)) as front, channel_to(front) as channel:
            stub = BraidStub(channel)
            for request, told in (
                (say("hi"), "send token ids"),
                (pb.GenerateRequest(token_ids=ids, sampling=pb.Sampling(stop=["x"])), "use stop_token_ids"),
            ):
                error = await refusal(stub.Generate(request))
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert told in (error.details() or "")

    run(scenario())


def test_busy_and_unavailable_say_when_to_come_back(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0", total_blocks=1, free_blocks=1)
        async with serving(byte_tokenizer, worker, max_waiting=0) as stub:
            running = stub.Generate(say("x"))
            await submitted(worker)
            busy = await refusal(stub.Generate(say("y")))
            assert busy.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(busy.trailing_metadata())["retry-after"] == "1"
            worker.die()
            lost = await refusal(running)
            assert lost.code() == grpc.StatusCode.UNAVAILABLE
            assert "both-0 was lost" in (lost.details() or "")
            assert (await refusal(stub.Generate(say("z")))).code() == grpc.StatusCode.UNAVAILABLE

    run(scenario())


def test_health_follows_the_workers(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with front_of(byte_tokenizer) as front, channel_to(front, api_keys=["k"]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            worker = ScriptedWorker(run_dir, "both-0")
            await front.apply(view_of(worker))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            whole = await health.Check(health_pb2.HealthCheckRequest(service=""))
            assert whole.status == health_pb2.HealthCheckResponse.SERVING
            worker.die()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()

    run(scenario())


def test_closing_lets_calls_end_and_says_not_serving(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with front_of(byte_tokenizer, worker) as front:
            server = await serve_grpc(front, "127.0.0.1", 0, INFO)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                stub: Any = BraidStub(channel)
                call = stub.Generate(say("x"))
                submit = await submitted(worker)
                closing = asyncio.create_task(server.close(grace_s=20.0))
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                watch.cancel()
                worker.say(TokenItem(submit.id, 0, [65], finish="length"))
                assert (await call.read()).text == "A"
                assert await call.read() is grpc.aio.EOF
                await closing

    run(scenario())


def test_reflection_describes_the_service(byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with front_of(byte_tokenizer) as front, channel_to(front) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            ]
            listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(ask))]
            names = {service.name for service in listed.list_services_response.service}
            assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            assert described.file_descriptor_response.file_descriptor_proto == [pb.DESCRIPTOR.serialized_pb]

    run(scenario())


def test_api_keys(byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with front_of(byte_tokenizer) as front, channel_to(front, api_keys=["one", "two"]) as channel:
            stub: Any = BraidStub(channel)
            for metadata in ([], [("authorization", "Bearer three")], [("authorization", "two")]):
                with pytest.raises(grpc.aio.AioRpcError, match="authorization: Bearer KEY") as refused:
                    await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
                stream = await refusal(stub.Generate(say("x"), metadata=metadata))
                assert stream.code() == grpc.StatusCode.UNAUTHENTICATED
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=[("authorization", "Bearer two")])
            assert (info.name, info.max_model_len, list(info.notices)) == ("tiny", 4096, list(INFO.notices))

    run(scenario())


def test_a_port_in_use_is_said_before_anything_is_served(byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with front_of(byte_tokenizer) as front:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
                with pytest.raises(ValueError, match=f"127.0.0.1:{port}: Address already in use; choose another"):
                    await serve_grpc(front, "127.0.0.1", port, INFO)
            first = await serve_grpc(front, "127.0.0.1", 0, INFO)
            with pytest.raises(ValueError, match="Address already in use"):
                await serve_grpc(front, "127.0.0.1", first.port, INFO)
            await first.close()

    run(scenario())
