"""The OpenAI interface over a real server, real clients and a scripted front end."""

import json
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_front import WAIT_S, ScriptedFront, logprob, served, small_tokenizer

from braid.cluster.request import ModelInfo
from braid.model.tokenizer import Tokenizer

MODEL, CONTEXT = "tiny", 120


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    made: Tokenizer = small_tokenizer(tmp_path_factory.mktemp("model"))
    return made


def info(tokenizer: Tokenizer, *notices: str) -> ModelInfo:
    return ModelInfo(MODEL, CONTEXT, tokenizer.vocab_size, "DeepseekV3ForCausalLM", 1_700_000_000, notices)


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[tuple[ScriptedFront, str]]:
    front = ScriptedFront(tokenizer)
    with served(front, info(tokenizer, "use restrictions")) as port:
        yield front, f"http://127.0.0.1:{port}"


@pytest.fixture
def front(server: tuple[ScriptedFront, str]) -> ScriptedFront:
    server[0].reset()
    return server[0]


@pytest.fixture
def url(server: tuple[ScriptedFront, str], front: ScriptedFront) -> str:
    return server[1]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, path: str = "completions", **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def events(url: str, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{url}/v1/{path}", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.content.split(b"\n\n")
    assert parts.pop() == b""
    assert parts.pop() == b"data: [DONE]"
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


def stream_request(url: str, **body: Any) -> AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True})


@contextmanager
def raw_post(url: str, body: bytes, length: int | None = None) -> Iterator[socket.socket]:
    """A connection that has sent this much of a request, and is cut at the end."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length or len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def without_identity(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


# ---- models, health, metrics


def test_models_show_the_context_and_the_terms_of_use(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert client.models.retrieve(MODEL) == card
    assert (card.id, card.created) == (MODEL, 1_700_000_000)
    assert card.model_extra is not None
    assert card.model_extra["max_model_len"] == CONTEXT
    assert card.model_extra["notices"] == ["use restrictions"]


def test_health_follows_readiness(front: ScriptedFront, url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    front.ready = False
    answer = httpx.get(f"{url}/health")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"


def test_metrics_are_handed_through(url: str) -> None:
    answer = httpx.get(f"{url}/metrics")
    assert answer.text == "braid_up 1.0\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/health", "/metrics"])
def test_what_can_be_read_can_be_probed(url: str, path: str) -> None:
    read, probed = httpx.get(url + path), httpx.head(url + path)
    assert (probed.status_code, probed.content) == (200, b"")
    assert probed.headers["content-length"] == str(len(read.content))


# ---- completions


def test_every_sampling_field_reaches_the_front_end(front: ScriptedFront, url: str) -> None:
    post(
        url,
        model=MODEL,
        prompt="hi",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=-4,
        stop=["x", "y"],
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3],
        logprobs=5,
        priority=-2,
        user="someone",
        never_heard_of=1,
    )
    (request,) = front.seen
    assert request.params.to_wire() == {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -4,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": (3,),
        "logprobs": 5,
        "prompt_logprobs": None,
    }
    assert request.stop == ("x", "y")
    assert (request.priority, request.caller) == (-2, "someone")
    assert request.prompt_ids == tuple(front.tokenizer.encode("hi"))


def test_defaults_and_nulls(front: ScriptedFront, url: str) -> None:
    post(url, prompt="hi", temperature=None, stop=None, n=None, logit_bias={}, best_of=1, top_k=-1)
    post(url, prompt="hi")
    first, second = (request.params for request in front.seen)
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k) == (16, 1.0, 1.0, 0)
    assert first.seed != second.seed, "without a seed every request draws its own"


def test_default_max_tokens_gives_way_to_the_context(front: ScriptedFront, url: str) -> None:
    post(url, prompt=[5] * (CONTEXT - 3))
    assert front.seen[0].params.max_tokens == 3


def test_prompts_of_every_form(front: ScriptedFront, url: str) -> None:
    encode = front.tokenizer.encode
    for prompt, sequences in [
        ("ab", [encode("ab")]),
        (["ab", "c"], [encode("ab"), encode("c")]),
        ([7, 8], [[7, 8]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
    ]:
        front.seen.clear()
        choices = post(url, prompt=prompt)["choices"]
        assert [list(request.prompt_ids) for request in front.seen] == sequences
        assert [choice["index"] for choice in choices] == list(range(len(sequences)))


def test_choices_of_prompts_run_at_once_with_seeds_counted_up(front: ScriptedFront, url: str) -> None:
    answer = post(url, prompt=["a", "b"], n=2, seed=2**63 - 1, max_tokens=60)
    assert [choice["text"] for choice in answer["choices"]] == [f"answer {2**63 - 1}", f"answer {-(2**63)}"] * 2
    assert front.most_running == 4
    num_prompt = sum(len(front.tokenizer.encode(text)) for text in "ab")
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["total_tokens"] == num_prompt + answer["usage"]["completion_tokens"]


def test_many_choices_do_not_all_run_at_once(front: ScriptedFront, url: str) -> None:
    assert len(post(url, prompt="a", n=100, seed=0)["choices"]) == 100
    assert front.most_running == 64


def test_the_client_library_understands_answer_and_logprobs(client: openai.OpenAI, front: ScriptedFront) -> None:
    answer = client.completions.create(model=MODEL, prompt="hi", seed=3, logprobs=2, stop="wer")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("ans", "stop")
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] == "wer"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == answer.usage.completion_tokens - 1
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 3
    shown = choice.logprobs
    assert shown is not None
    assert shown.tokens is not None
    assert "".join(shown.tokens) == "answer"
    assert shown.text_offset == [len("".join(shown.tokens[:place])) for place in range(len(shown.tokens))]
    assert shown.top_logprobs is not None
    assert all(len(entry) == 3 for entry in shown.top_logprobs)
    assert shown.token_logprobs == [logprob(token) for token in front.tokenizer.encode("answer", False)]


def test_echo_scores_the_prompt_without_generating(front: ScriptedFront, url: str) -> None:
    (choice,) = post(url, prompt="héllo 😀", max_tokens=0, echo=True, logprobs=0)["choices"]
    ids = front.tokenizer.encode("héllo 😀")
    shown = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == ("héllo 😀", "length")
    assert shown["token_logprobs"] == [None, *(logprob(token) for token in ids[1:])]
    assert shown["top_logprobs"][0] is None
    assert len(shown["tokens"]) == len(shown["text_offset"]) == len(ids)
    assert max(shown["text_offset"]) <= len("héllo 😀")
    (bare,) = post(url, prompt="abc", max_tokens=0, echo=True)["choices"]
    assert (bare["text"], bare["logprobs"]) == ("abc", None)


def test_echo_goes_on_into_the_answer(front: ScriptedFront, url: str) -> None:
    ids = front.tokenizer.encode("say ")
    (choice,) = post(url, prompt=ids, max_tokens=2, echo=True, logprobs=1, seed=1, return_token_ids=True)["choices"]
    said = front.tokenizer.encode("answer", add_special_tokens=False)[:2]
    assert choice["text"] == "say " + front.tokenizer.decode(said)
    assert choice["logprobs"]["token_logprobs"] == [None, *(logprob(token) for token in [*ids[1:], *said])]
    assert choice["logprobs"]["text_offset"][len(ids)] == len("say ")
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, said)


def test_tokens_can_be_named_by_their_ids(front: ScriptedFront, url: str) -> None:
    (choice,) = post(url, prompt="a", logprobs=1, max_tokens=1, return_tokens_as_token_ids=True, seed=1)["choices"]
    token = front.tokenizer.encode("answer", add_special_tokens=False)[0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}"]
    assert set(choice["logprobs"]["top_logprobs"][0]) == {f"token_id:{token}", f"token_id:{token + 1}"}


@pytest.mark.parametrize("reply", ["", "one", 'naïve 😀 日本語\u2028 \x85 "quoted"\n', "😀" * 4])
@pytest.mark.parametrize(
    "wishes", [{}, {"echo": True, "logprobs": 2}, {"return_token_ids": True}, {"n": 3, "stop": ["本"], "logprobs": 0}]
)
def test_a_stream_adds_up_to_the_whole_answer(
    front: ScriptedFront, url: str, reply: str, wishes: dict[str, Any]
) -> None:
    front.reply = lambda request: f"{reply}{request.params.seed % 3}"
    asked = {"prompt": ["hi", "ho"], "seed": 1, "max_tokens": 60, **wishes}
    whole = post(url, **asked)
    chunks = events(url, **asked, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert "\ufffd" not in choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        for key in ("token_ids", "prompt_token_ids"):
            assert [token for part in parts for token in part.get(key, [])] == choice.get(key, [])
        if "logprobs" in wishes:
            for key, values in choice["logprobs"].items():
                assert [value for part in parts if part["logprobs"] for value in part["logprobs"][key]] == values


def test_usage_comes_only_when_asked_for(url: str) -> None:
    chunks = events(url, prompt="hi")
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(tmp_path: Path) -> None:
    front = ScriptedFront(Tokenizer(tmp_path), reply=lambda request: "")
    with served(front, ModelInfo(MODEL, CONTEXT, 1000)) as port:
        url = f"http://127.0.0.1:{port}"
        asked: dict[str, Any] = {
            "prompt": [3, 4],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
            "return_token_ids": True,
        }
        (choice,) = post(url, **asked)["choices"]
        assert choice["logprobs"]["top_logprobs"] == [None, {"token_id:5": -0.6875, "token_id:4": -0.625}]
        assert choice["prompt_token_ids"] == [3, 4]
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 400
        assert "send token ids" in refused.json()["error"]["message"]


# ---- chat


def test_chat_renders_encodes_and_answers(client: openai.OpenAI, front: ScriptedFront) -> None:
    parts: Any = [{"type": "text", "text": "é"}, {"type": "text", "text": "b"}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
        seed=5,
        logprobs=True,
        top_logprobs=2,
    )
    (request,) = front.seen
    assert front.tokenizer.decode(request.prompt_ids) == "<system>s<user>é\nb<a>"
    assert request.prompt_ids[0] != front.tokenizer.bos_id, "the template says where the begin token goes"
    assert request.params.max_tokens == CONTEXT - len(request.prompt_ids)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "answer 5", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(token.bytes or []) for token in choice.logprobs.content[:-1]) == b"answer 5"
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_a_developer_s_message_is_the_system_s(front: ScriptedFront, url: str) -> None:
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": "u"}]
    post(url, "chat/completions", messages=messages, max_tokens=1)
    assert front.tokenizer.decode(front.seen[0].prompt_ids) == "<system>s<user>u<a>"


def test_chat_streams_what_it_answers(client: openai.OpenAI, front: ScriptedFront) -> None:
    front.reply = lambda request: f"日本語 😀 {request.params.seed}"
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "seed": 1,
        "n": 2,
        "max_completion_tokens": 40,
        "logprobs": True,
        "extra_body": {"return_token_ids": True},
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert (chunks[0].model_extra or {})["prompt_token_ids"] == (whole.model_extra or {})["prompt_token_ids"]
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert (
            "".join(part.delta.content or "" for part in parts)
            == choice.message.content
            == f"日本語 😀 {1 + choice.index}"
        )
        assert parts[-1].finish_reason == choice.finish_reason == "stop"
        shown = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
        assert choice.logprobs is not None
        assert shown == choice.logprobs.content
        token_ids = [token for part in parts for token in (part.model_extra or {}).get("token_ids", [])]
        assert token_ids == (choice.model_extra or {})["token_ids"]


def test_chat_template_switches_reach_the_template(front: ScriptedFront, url: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    post(url, "chat/completions", messages=messages, max_tokens=1, add_generation_prompt=False)
    assert front.tokenizer.decode(front.seen[0].prompt_ids) == "<user>hi"


# ---- around the answer


def test_trace_headers_travel_with_the_request(front: ScriptedFront, url: str) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, headers={**trace, "x-other": "1"})
    assert front.seen[0].carrier == trace


def test_the_answer_s_id_stands_in_the_traces(front: ScriptedFront, url: str) -> None:
    answer = post(url, prompt="hi", n=2)
    assert [request.request_id for request in front.seen] == [f"{answer['id']}-{choice}" for choice in (0, 1)]


def test_large_bodies_are_answered_alike(front: ScriptedFront, url: str) -> None:
    asked: dict[str, Any] = {"prompt": "hi", "seed": 1}
    large = post(url, **asked, user="x" * 100_000)
    assert without_identity(large) == without_identity(post(url, **asked))


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream_ends_its_sequences(front: ScriptedFront, url: str, n: int) -> None:
    front.hold_after = 2
    with stream_request(url, prompt="hi", n=n) as answer:
        next(answer.iter_lines())
    assert front.closed.wait(WAIT_S)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_before_the_first_token_ends_it(front: ScriptedFront, url: str, is_stream: bool) -> None:
    front.hold_after = 0
    with raw_post(url, json.dumps({"prompt": "hi", "stream": is_stream}).encode()):
        assert front.held.wait(WAIT_S)
    assert front.closed.wait(WAIT_S)


def test_a_client_that_leaves_within_its_body_is_forgotten(front: ScriptedFront, url: str) -> None:
    with raw_post(url, b'{"prompt"', length=1000):
        pass
    assert post(url, prompt="hi", seed=1)["choices"][0]["text"] == "answer 1"
    assert len(front.seen) == 1


def test_keys_guard_v1_alone(tokenizer: Tokenizer) -> None:
    keys = frozenset({"first", "schlüssel"})
    front = ScriptedFront(tokenizer)
    with served(front, info(tokenizer), api_keys=keys) as port:
        url = f"http://127.0.0.1:{port}"
        for header in [None, "Bearer", "Bearer wrong", "Basic first", "first", "Bearer first2"]:
            headers = {"authorization": header} if header else {}
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in (b"Bearer first", "bearer schlüssel".encode()):
            assert httpx.get(f"{url}/v1/models", headers={b"authorization": key}).status_code == 200
            assert httpx.post(
                f"{url}/v1/completions", json={"prompt": "hi"}, headers={b"authorization": key}
            ).is_success
        assert len({request.caller for request in front.seen}) == 2  # they take turns
        twice = [("authorization", "Bearer invented"), ("authorization", "Bearer first")]
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, headers=twice).status_code == 401
        assert httpx.get(f"{url}/v1/nothing").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="no") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
