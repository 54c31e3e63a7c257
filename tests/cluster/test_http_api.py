"""The OpenAI interface over a real server, real clients and a scripted front end: what is asked, and by whom."""

import json
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import openai
import pytest
from scripted_front import CONTEXT, MODEL, WAIT_S, ScriptedFront, call, model_info, post, served

from braid.model.tokenizer import Tokenizer


def stream_request(url: str, **body: Any) -> AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=WAIT_S)


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
    assert call("GET", f"{url}/health").status_code == 200
    front.ready = False
    answer = call("GET", f"{url}/health")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"


def test_metrics_are_handed_through(url: str) -> None:
    answer = call("GET", f"{url}/metrics")
    assert answer.text == "braid_up 1.0\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/health", "/metrics"])
def test_what_can_be_read_can_be_probed(url: str, path: str) -> None:
    read, probed = call("GET", url + path), call("HEAD", url + path)
    assert (probed.status_code, probed.content) == (200, b"")
    assert probed.headers["content-length"] == str(len(read.content))


# ---- what reaches the front end


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


def test_a_developer_s_message_is_the_system_s(front: ScriptedFront, url: str) -> None:
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": "u"}]
    post(url, "chat/completions", messages=messages, max_tokens=1)
    assert front.tokenizer.decode(front.seen[0].prompt_ids) == "<system>s<user>u<a>"


def test_chat_template_switches_reach_the_template(front: ScriptedFront, url: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    post(url, "chat/completions", messages=messages, max_tokens=1, add_generation_prompt=False)
    assert front.tokenizer.decode(front.seen[0].prompt_ids) == "<user>hi"


# ---- around the answer


def test_trace_headers_travel_with_the_request(front: ScriptedFront, url: str) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    call("POST", f"{url}/v1/completions", json={"prompt": "hi"}, headers={**trace, "x-other": "1"})
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
    with served(front, model_info(tokenizer), api_keys=keys) as port:
        url = f"http://127.0.0.1:{port}"
        for header in [None, "Bearer", "Bearer wrong", "Basic first", "first", "Bearer first2"]:
            headers = {"authorization": header} if header else {}
            answer = call("POST", f"{url}/v1/completions", json={"prompt": "hi"}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in (b"Bearer first", "bearer schlüssel".encode()):
            assert call("GET", f"{url}/v1/models", headers={b"authorization": key}).status_code == 200
            assert call(
                "POST", f"{url}/v1/completions", json={"prompt": "hi"}, headers={b"authorization": key}
            ).is_success
        assert len({request.caller for request in front.seen}) == 2  # they take turns
        twice = [("authorization", "Bearer invented"), ("authorization", "Bearer first")]
        assert call("POST", f"{url}/v1/completions", json={"prompt": "hi"}, headers=twice).status_code == 401
        assert call("GET", f"{url}/v1/nothing").status_code == 401
        assert call("GET", f"{url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="no") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
