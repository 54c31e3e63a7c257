"""Every way to fail: the right status, OpenAI's shape, the field and what to do about it."""

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_front import WAIT_S, ScriptedFront, busy, call, served, small_tokenizer

from braid.cluster.http_errors import REFUSALS
from braid.cluster.request import ModelInfo, RefusalCode, RequestRefused
from braid.model.tokenizer import Tokenizer

MODEL, CONTEXT, MAX_BODY = "tiny", 50, 100_000
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    refuses_robots = (
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}{% endfor %}x"
    )
    made: Tokenizer = small_tokenizer(tmp_path_factory.mktemp("model"), chat_template=refuses_robots)
    return made


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[tuple[ScriptedFront, str]]:
    front = ScriptedFront(tokenizer)
    with served(front, ModelInfo(MODEL, CONTEXT, tokenizer.vocab_size), max_body_bytes=MAX_BODY) as port:
        yield front, f"http://127.0.0.1:{port}/v1"


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "prompt must be a string, token ids, or a list of these"),
    ({"prompt": ""}, "prompt", "prompt 0 is empty"),
    ({"prompt": []}, "prompt", "prompt must be"),
    ({"prompt": [[]]}, "prompt", "prompt 0 is empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt 1 is empty"),
    ({"prompt": ["a", [1]]}, "", ""),
    ({"prompt": [1, "a"]}, "prompt", "prompt 0 is neither"),
    ({"prompt": {"a": 1}}, "prompt", "prompt must be"),
    ({"prompt": [True]}, "prompt", "prompt 0 is neither"),
    ({"prompt": [-1]}, "prompt", "token id -1: use 0 to"),
    ({"prompt": [10**9]}, "prompt", "token id 1000000000"),
    ({"prompt": "a", "temperature": -1}, "temperature", "temperature is -1.0: use 0 (greedy)"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "temperature is 'hot'"),
    ({"prompt": "a", "top_p": 0}, "top_p", "top_p is 0.0: use a number in (0, 1]"),
    ({"prompt": "a", "top_p": 1.5}, "top_p", "top_p is 1.5"),
    ({"prompt": "a", "top_k": -2}, "top_k", "top_k is -2"),
    ({"prompt": "a", "top_k": 1.5}, "top_k", "top_k is 1.5"),
    ({"prompt": "a", "min_p": 2}, "min_p", "min_p is 2"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "set echo to score the prompt"),
    ({"prompt": "a", "max_tokens": -3}, "max_tokens", "max_tokens is -3"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens is True"),
    (
        {"prompt": "a", "max_tokens": 49},
        "max_tokens",
        "context is 50 tokens, but the prompt has 2 tokens and max_tokens is 49: use at most 48",
    ),
    ({"prompt": [5] * 51}, "prompt", "context is 50 tokens, but the prompt has 51 tokens: shorten it"),
    ({"prompt": [5] * 50}, "prompt", "shorten it"),
    ({"prompt": [5] * 51, "max_tokens": 1}, "prompt", "shorten it"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens", "use 0 to max_tokens (16)"),
    ({"prompt": "a", "seed": 2**63}, "seed", "use a 64-bit signed integer"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "use 0 to 20"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "logprobs is True"),
    ({"prompt": "a", "n": 0}, "n", "n is 0: use 1 to"),
    ({"prompt": ["a", "b"], "n": 1025}, "prompt", "2 prompts times n 1025"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "17 strings: use at most 16"),
    ({"prompt": "a", "stop": [""]}, "stop", "empty string"),
    ({"prompt": "a", "stop": 5}, "stop", "stop is 5"),
    ({"prompt": "a", "stop": ["x", 5]}, "stop.1", "stop.1 is 5: input should be a valid string"),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ({"prompt": "a", "best_of": 2}, "best_of", "best_of is not supported: use n"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
    ({"prompt": "a", "logit_bias": {"1": 5}}, "logit_bias", "logit_bias is not supported"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs", "use echo with logprobs"),
    ({"prompt": "a", "max_completion_tokens": 5}, "max_completion_tokens", "not supported: use max_tokens"),
    ({"prompt": "a", "top_logprobs": 5}, "top_logprobs", "not supported: set logprobs to their number"),
]


@pytest.mark.parametrize(("body", "param", "message"), COMPLETIONS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_bad_completion_names_field_value_and_remedy(
    front: ScriptedFront, url: str, body: dict[str, Any], param: str, message: str, is_stream: bool
) -> None:
    answer = call("POST", f"{url}/completions", json=body if "stream_options" in body else body | {"stream": is_stream})
    if not message:  # prompts of both forms may be mixed
        assert answer.status_code == 200
        return
    error = error_of(answer, 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert error["code"] == ("context_length_exceeded" if "context" in message or "shorten" in message else None)
    assert not front.seen


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": "hi"}, "messages", "messages is 'hi'"),
        ({"messages": ["hi"]}, "messages.0", "messages.0 is 'hi'"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "messages.0.role is None"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "must be a string or a list of text parts"),
        ({"messages": [USER, {"role": "user", "content": []}]}, "messages.1.content", "messages.1.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "reads text only"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages", "no robots"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs", "use 0 to 20"),
        ({"messages": [USER], "logprobs": 2}, "logprobs", "logprobs is 2"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"messages": [USER], "max_tokens": 60}, "max_tokens", "max_tokens is 60: use at most 49"),
        ({"messages": [USER], "max_completion_tokens": 60}, "max_completion_tokens", "tokens is 60: use at most 49"),
        ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens", "tokens is 0: use 1 or more"),
        ({"messages": [USER], "echo": True}, "echo", "echo is not supported"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ],
)
def test_a_bad_chat_names_field_value_and_remedy(url: str, body: dict[str, Any], param: str, message: str) -> None:
    error = error_of(call("POST", f"{url}/chat/completions", json=body), 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("raw", "code", "message"),
    [
        (b"", "invalid_json", "not valid JSON"),
        (b"{", "invalid_json", "line 1 column 1"),
        (b'{"prompt": "\xff"}', "invalid_utf8", "byte 0xff at offset 12"),
        (b'{"prompt": "\\ud800"}', "invalid_json", "not valid JSON"),
        (b"[]", None, "the body is []"),
        (b'{"prompt": "a", "temperature": NaN}', None, "temperature is nan"),
        (b'{"prompt": "a", "temperature": 1e999}', None, "temperature is inf"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "invalid_json", "recursion limit"),
    ],
)
def test_a_body_that_is_no_request(url: str, raw: bytes, code: str | None, message: str) -> None:
    error = error_of(call("POST", f"{url}/completions", content=raw), 400)
    assert error["code"] == code
    assert message in error["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_unknown_model_is_not_found(url: str, path: str) -> None:
    error = error_of(call("POST", f"{url}/{path}", json={"model": "gpt", "prompt": "a", "messages": [USER]}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt' does not exist: this server has 'tiny'" in error["message"]
    assert error_of(call("GET", f"{url}/models/gpt"), 404)["code"] == "model_not_found"


def test_unknown_routes_and_methods(url: str) -> None:
    assert error_of(call("GET", f"{url}/nothing"), 404)["code"] == "not_found"
    answer = call("GET", f"{url}/completions")
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


def test_a_packed_body_is_not_unpacked(url: str) -> None:
    packed = gzip.compress(json.dumps({"prompt": "a"}).encode())
    error = error_of(call("POST", f"{url}/completions", content=packed, headers={"content-encoding": "gzip"}), 415)
    assert error["message"] == "content-encoding is 'gzip': send the body as it is"


def test_a_body_announced_too_large_is_refused_unread(url: str) -> None:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_grows_too_large_is_cut_off(front: ScriptedFront, url: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 65_536
            yield b"a" * 65_536

    error = error_of(call("POST", f"{url}/completions", content=endless()), 413)
    assert error["code"] == "body_too_large"
    assert "100000 bytes" in error["message"]
    assert sent < 10_000 * 65_536
    assert error_of(call("POST", f"{url}/completions", content=b"a" * (MAX_BODY + 1)), 413)
    assert error_of(call("POST", f"{url}/completions", content=b"a" * MAX_BODY), 400)
    assert not front.seen


@pytest.mark.parametrize("code", list(REFUSALS))
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_refusal_before_the_first_token_has_its_status(
    front: ScriptedFront, url: str, code: RefusalCode, is_stream: bool
) -> None:
    front.fail = RequestRefused(code, "because", 1.2 if code == "busy" else None)
    answer = call("POST", f"{url}/completions", json={"prompt": "a", "stream": is_stream, "n": 2})
    statuses = {"invalid": 400, "not_found": 404, "busy": 429, "internal": 500, "unavailable": 503, "deadline": 504}
    error = error_of(answer, statuses[code])
    assert (error["message"], error["code"]) == ("because", code)
    assert answer.headers.get("retry-after") == ("2" if code == "busy" else None)


def test_the_client_library_raises_its_own_errors(front: ScriptedFront, url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        front.fail = busy()
        with pytest.raises(openai.RateLimitError, match="256 requests wait already"):
            client.completions.create(model=MODEL, prompt="a")
        front.fail_after = 2
        stream = client.completions.create(model=MODEL, prompt="a", stream=True)
        assert next(stream).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="256 requests wait already"):
            list(stream)


@pytest.mark.parametrize(
    ("fail", "code"),
    [(RequestRefused("unavailable", "a worker died"), "unavailable"), (KeyError("secret"), "internal")],
)
def test_a_failure_within_a_stream_is_its_last_event(
    front: ScriptedFront, url: str, fail: Exception, code: str
) -> None:
    front.fail, front.fail_after = fail, 3
    answer = call("POST", f"{url}/completions", json={"prompt": "a", "stream": True, "seed": 1})
    assert answer.status_code == 200
    *chunks, last = [json.loads(part.removeprefix("data: ")) for part in answer.text.split("\n\n")[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ans"
    assert last["error"]["code"] == code
    assert "secret" not in answer.text


def test_a_defect_is_answered_without_its_details(front: ScriptedFront, url: str) -> None:
    front.fail = KeyError("secret")
    for is_stream in (False, True):
        answer = call("POST", f"{url}/completions", json={"prompt": "a", "stream": is_stream})
        assert error_of(answer, 500)["code"] == "internal"
        assert "secret" not in answer.text


def test_one_failing_choice_ends_the_others(front: ScriptedFront, url: str) -> None:
    front.fail, front.fail_after = busy(), 1
    assert call("POST", f"{url}/completions", json={"prompt": ["a", "b"], "n": 3}).status_code == 429
    assert front.running == 0


def test_without_a_tokenizer_there_is_no_text_to_send_or_to_stop_in(tmp_path: Path) -> None:
    front = ScriptedFront(Tokenizer(tmp_path))
    with served(front, ModelInfo(MODEL, CONTEXT, 280)) as port:
        url = f"http://127.0.0.1:{port}/v1/completions"
        text = error_of(call("POST", url, json={"prompt": "hi"}), 400)
        assert (text["param"], "send token ids" in text["message"]) == ("prompt", True)
        stop = error_of(call("POST", url, json={"prompt": [5, 6], "stop": "x"}), 400)
        assert (stop["param"], "use stop_token_ids" in stop["message"]) == ("stop", True)
    assert front.seen == []
