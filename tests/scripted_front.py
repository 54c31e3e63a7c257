"""A front end without a cluster: its "model" says what a test tells it to. Text, stops and order are the real ones."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from braid.cluster.http_api import build_app
from braid.cluster.http_listen import IDLE_S
from braid.cluster.request import Delta, GenerateRequest, ModelInfo, RequestRefused
from braid.cluster.streams import OutputStream
from braid.model.tokenizer import Tokenizer

WAIT_S = 120.0  # ends what waits in vain
MODEL, CONTEXT = "tiny", 120
BOS, EOS = "<bos>", "<eos>"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
Reply = Callable[[GenerateRequest], str]


def logprob(token_id: int) -> float:
    return -(token_id % 7 + 1) / 8


def top(token_id: int, count: int) -> list[list[Any]]:
    return [[token_id + step, logprob(token_id) - step / 16] for step in range(1, count + 1)]


def small_tokenizer(directory: Path, **config: Any) -> Tokenizer:
    """Byte-level, with a few merges, a begin token and a chat template."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["héllo wörld 😀 日本語 say the"] * 4, trainer)
    library.add_special_tokens([BOS, EOS])
    library.save(str(directory / "tokenizer.json"))
    ours = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(ours | config))
    return Tokenizer(directory)


@dataclass
class ScriptedFront:
    """`fail` is raised after `fail_after` tokens; with `hold_after` tokens out, a sequence waits until it is closed."""

    tokenizer: Tokenizer
    reply: Reply = lambda request: f"answer {request.params.seed}"
    ready: bool = True
    fail: Exception | None = None
    fail_after: int = 0
    hold_after: int | None = None
    seen: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    held: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        """For the next test on the same server."""
        assert self.running == 0, "a sequence was left running"
        self.__init__(self.tokenizer)  # type: ignore[misc]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self.seen.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            stream = OutputStream(request.prompt_ids, request.params, request.stop, self.tokenizer.decoder())
            for place, item in enumerate(self._items(request)):
                await asyncio.sleep(0)  # lets the other sequences run in between
                if place == self.hold_after:
                    self.held.set()
                    await asyncio.Event().wait()
                if self.fail is not None and place == self.fail_after:
                    raise self.fail
                for delta in stream.push(item):
                    yield delta
                if stream.is_done:
                    return
        finally:
            self.running -= 1
            if not self.running:
                self.closed.set()

    def _items(self, request: GenerateRequest) -> Iterator[dict[str, Any]]:
        params = request.params
        text = self.reply(request)
        told = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        ids = [*told, self.tokenizer.eos_id or 0][: params.max_tokens]
        for index, token_id in enumerate(ids or [None]):
            is_end = token_id == self.tokenizer.eos_id
            finish = "stop" if is_end else "length" if index + 1 >= params.max_tokens else None
            token_ids = [] if token_id is None else [token_id]
            item = {"index": index, "token_ids": token_ids, "finish": finish, "cached": 1}
            item |= {"accepted": index, "rejected": 3}
            if params.logprobs is not None:
                item["logprobs"] = [[logprob(token), top(token, params.logprobs)] for token in token_ids]
            if params.prompt_logprobs is not None and not index:
                scored = [[logprob(token), top(token, params.prompt_logprobs)] for token in request.prompt_ids[1:]]
                item["prompt_logprobs"] = [None, *scored]
            yield item


def busy() -> RequestRefused:
    return RequestRefused("busy", "256 requests wait already", 1.2)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextmanager
def served(front: ScriptedFront, info: ModelInfo, **options: Any) -> Iterator[int]:
    """A real server on a loopback port of its own choosing, in a thread; yields the port."""

    async def metrics() -> bytes:
        return b"braid_up 1.0\n"

    app = build_app(lambda: front, info, metrics, **options)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", timeout_keep_alive=IDLE_S
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.is_up.wait(WAIT_S)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert front.running == 0, "a sequence was left running"


def model_info(tokenizer: Tokenizer, *notices: str) -> ModelInfo:
    return ModelInfo(MODEL, CONTEXT, tokenizer.vocab_size, "DeepseekV3ForCausalLM", 1_700_000_000, notices)


def call(method: str, url: str, **what: Any) -> httpx.Response:
    """On a connection of its own."""
    return httpx.request(method, url, timeout=WAIT_S, **what)


def post(url: str, path: str = "completions", **body: Any) -> dict[str, Any]:
    answer = call("POST", f"{url}/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed
