"""What answers look like to OpenAI's clients, whole and streamed: the same server and scripted front end."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted_front import CONTEXT, MODEL, ScriptedFront, call, logprob, post, served

from braid.cluster.request import ModelInfo
from braid.model.tokenizer import Tokenizer


def events(url: str, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
    answer = call("POST", f"{url}/v1/{path}", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.content.split(b"\n\n")
    assert parts.pop() == b""
    assert parts.pop() == b"data: [DONE]"
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


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
        refused = call("POST", f"{url}/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 400
        assert "send token ids" in refused.json()["error"]["message"]


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
