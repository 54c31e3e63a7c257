"""The other end of a front end's wire: real links, no model. What it answers is what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from waiting import LIMIT_S

from braid.actors.dialing import host_id
from braid.actors.links import Hello, Link, LinkClosed
from braid.actors.listener import Listener
from braid.actors.messages import Kind, Submit, TokenItem, pack, unpack
from braid.actors.reactor import Closed, Opened, Reactor
from braid.actors.view import ClusterView, Role, WorkerInfo
from braid.cluster.front_end import FrontEnd
from braid.cluster.request import Delta, FrontEndSettings, GenerateRequest
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

SECRET = b"the secret of a test cluster, 32 b"
WAIT_S = 120.0  # ends what waits in vain
BLOCK_SIZE = 64
PROMPT = tuple(range(65, 65 + 10))

Answer = Callable[[Submit], list[TokenItem]]


class ScriptedWorker:
    """`answer` replies to every SUBMIT at once; without one, the test says what and when."""

    def __init__(self, run_dir: Path, name: str, role: Role = "both", incarnation: int = 1, **load: Any) -> None:
        self.hello = Hello(name, role, incarnation, host_id())
        self.answer: Answer | None = None
        self.submits: queue.Queue[Submit] = queue.Queue()
        self.cancels: queue.Queue[str] = queue.Queue()
        self._load: dict[str, Any] = {
            "worker": name,
            "role": role,
            "free_blocks": 64,
            "cached_blocks": 0,
            "total_blocks": 64,
            "block_size": BLOCK_SIZE,
            "sequences": 0,
            "max_sequences": 64,
            "running": 0,
            "waiting": 0,
            "waiting_tokens": 0,
            "counters": {},
        } | load
        self._fronts: list[Link] = []
        self._telling = threading.Lock()  # a load that has changed is told after the one before it
        self._is_stopping = False
        self._reactor = Reactor()
        path = str(run_dir / f"{name}.{incarnation}")
        self._listener = Listener(self.hello, SECRET, path, None, self._reactor.add)
        self.info = WorkerInfo(name, role, incarnation, host_id(), path, "", 0, 0, "node")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def say(self, *items: TokenItem, **load: Any) -> None:
        """One TOKENS message, with a load report that has changed as told."""
        with self._telling:
            self._load |= load
            self._send(Kind.TOKENS, {"load": self._load, "items": [item.wire() for item in items]})

    def tell_load(self, **load: Any) -> None:
        with self._telling:
            self._load |= load
            self._send(Kind.LOAD, {"load": self._load})

    def garble(self) -> None:
        for link in self._fronts:
            link.send(Kind.TOKENS, b"\xc1")

    @property
    def num_links(self) -> int:
        return len(self._fronts)

    def next_submit(self) -> Submit:
        return self.submits.get(timeout=WAIT_S)

    def next_cancel(self) -> str:
        return self.cancels.get(timeout=WAIT_S)

    def die(self) -> None:
        """What the front end sees of a SIGKILL: the socket ends. Called twice, the second does nothing."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._reactor.wake()
        self._thread.join(WAIT_S)
        self._listener.close()

    def _send(self, kind: Kind, body: dict[str, Any]) -> None:
        for link in list(self._fronts):
            _send(link, kind, body)

    def _serve(self) -> None:
        while not self._is_stopping:
            for event in self._reactor.poll(1.0):
                if isinstance(event, Opened):
                    with self._telling:
                        self._fronts.append(event.link)
                        _send(event.link, Kind.LOAD, {"load": self._load})
                elif isinstance(event, Closed):
                    self._fronts.remove(event.link)
                else:
                    self._receive(Kind(event.message.kind), event.message.meta)
        self._reactor.close()

    def _receive(self, kind: Kind, meta: bytes) -> None:
        if kind is Kind.CANCEL:
            self.cancels.put(unpack(meta)["id"])
            return
        submit = Submit.unpack(meta)
        if self.answer is not None:
            for item in self.answer(submit):
                self.say(item)
        self.submits.put(submit)


def _send(link: Link, kind: Kind, body: dict[str, Any]) -> None:
    with suppress(LinkClosed):  # the front end may go at any moment
        link.send(kind, pack(body))


def write_tokenizer(directory: Path, pieces: tuple[str, ...] = ()) -> Path:
    """A byte-level tokenizer whose token i is byte i; `pieces` follow from 256 on, then <eos> and a chat template."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    vocab = {letters[byte]: byte for byte in range(256)}
    for piece in pieces:
        vocab["".join(letters[byte] for byte in piece.encode())] = len(vocab)
    eos = {"id": len(vocab), "content": "<eos>", "special": True, "single_word": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [eos | {"lstrip": False, "rstrip": False, "normalized": False}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"eos_token": "<eos>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def view_of(*workers: ScriptedWorker, epoch: int = 1) -> ClusterView:
    return ClusterView(epoch, tuple(worker.info for worker in workers), None)


@asynccontextmanager
async def front_of(tokenizer: Tokenizer, *workers: ScriptedWorker, **settings: Any) -> AsyncIterator[FrontEnd]:
    """A front end linked to the workers; all of it gone afterwards, with nothing held."""
    wanted: dict[str, Any] = {"vocab_size": 257, "max_model_len": 4096} | settings
    front = FrontEnd(FrontEndSettings("front-0", SECRET, "tiny", **wanted), tokenizer)
    try:
        await front.apply(view_of(*workers))
        await until(lambda: len(front.load()["workers"]) == len(workers), "every worker's load")
        yield front
        assert (front.load()["running"], front.load()["waiting"]) == (0, 0)
        for linked in front.admission.workers.values():
            assert (linked.ledger.reserved, linked.ledger.unseen, linked.unprefilled_tokens) == (0, 0, 0)
    finally:
        await front.close()
        for worker in workers:
            worker.die()


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, f"waited {WAIT_S} s for {what}"
        await asyncio.sleep(0.002)


def run(scenario: Coroutine[Any, Any, None], timeout_s: float = LIMIT_S) -> None:
    asyncio.run(asyncio.wait_for(scenario, timeout_s))


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
