"""Attention workers and a front end in one process: real Requests, Engine, Scheduler, cache and links, no network.

The model is a script: the token after position p is always the same, and every latent row says which position it is
for, so that a row which was lost, or written into somebody else's block, is noticed by the next step.
"""

from __future__ import annotations

import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from braid.actors.engine import Engine
from braid.actors.links import DEFAULT_MAX_QUEUED_BYTES, Hello, Link, LinkClosed
from braid.actors.messages import Kind, Submit, pack, unpack
from braid.actors.pipe import Piece
from braid.actors.reactor import Closed, Reactor, Received
from braid.actors.requests import Requests
from braid.actors.scheduler import Scheduler
from braid.actors.socket_pipe import SocketPipe
from braid.actors.tracing import Tracer
from braid.model.config import ModelConfig
from braid.model.deepseek import Batch, DeepSeekModel, ForwardOutput
from braid.model.kv_cache import BLOCK_SIZE, BlockAllocator, LatentCache
from braid.model.sampling_params import SamplingParams

VOCAB, EOS = 50, 49
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 4,
        "qk_nope_head_dim": 2,
        "qk_rope_head_dim": 2,
        "v_head_dim": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "eos_token_id": EOS,
    }
)


def token_at(position: int) -> int:
    return (7 * position + 3) % VOCAB


def answer_to(num_prompt: int, params: SamplingParams) -> list[int]:
    """What a request that nothing disturbs gets."""
    tokens: list[int] = []
    while len(tokens) < params.max_tokens and (not tokens or params.ignore_eos or tokens[-1] != EOS):
        tokens.append(token_at(num_prompt + len(tokens)))
    return tokens


def _nothing() -> None:
    pass


class ScriptedModel:
    """`while_waiting` is called in every layer."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache
        self.layers = cache.layers
        self.defect: str | None = None
        self.while_waiting: Callable[[], None] = _nothing

    def forward(self, batch: Batch, on_layer: Any = None, micro_batches: int = 1) -> ForwardOutput:
        positions: list[int] = []
        for layer in range(len(self.cache.layers)):
            for segment in batch.segments:
                rows = self._rows(layer, segment.block_table, segment.start + segment.num)
                rows[segment.start :] = torch.arange(segment.start, segment.start + segment.num)[:, None].float()
                self._put(layer, segment.block_table, rows)
                assert rows[:, 0].tolist() == list(range(len(rows))), f"layer {layer}: rows {rows[:, 0].tolist()}"
                positions += range(segment.start, segment.start + segment.num) if not layer else ()
            if on_layer is not None:
                on_layer(layer)
            self.while_waiting()
        if self.defect:
            raise RuntimeError(self.defect)
        logits = torch.zeros(len(batch.logit_rows), VOCAB)
        for row, place in enumerate(batch.logit_rows.tolist()):
            logits[row, token_at(positions[place] + 1)] = 5.0
        return ForwardOutput(logits, torch.zeros(len(positions), 1))

    def _rows(self, layer: int, table: list[int], num: int) -> torch.Tensor:
        flat = self.cache.layers[layer].view(-1, CONFIG.latent_dim)
        return flat[slots(table, num)]

    def _put(self, layer: int, table: list[int], rows: torch.Tensor) -> None:
        flat = self.cache.layers[layer].view(-1, CONFIG.latent_dim)
        flat[slots(table, len(rows))] = rows


def slots(table: list[int], num: int) -> torch.Tensor:
    """Where the first `num` positions lie in a layer seen as rows."""
    positions = torch.arange(num)
    return torch.tensor(table)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


class ScriptedExperts:
    phase = 0
    wait_s = 0.0

    def __init__(self) -> None:
        self.has_waits = False
        self.may_redo = False
        self.is_whole = True  # until a pass loses rows
        self.num_losses = 0  # passes to come that lose rows
        self.failed: dict[int, str] = {}

    def take_failed(self) -> dict[int, str]:
        failed, self.failed = self.failed, {}
        return failed

    def is_settled(self) -> bool:
        self.num_losses -= 1
        self.is_whole = True
        return self.num_losses < 0

    def end_step(self) -> None:
        pass


class Worker:
    """`turn` is one round of the serving thread. `has_waits`: its experts are elsewhere."""

    def __init__(
        self, name: str, incarnation: int = 1, blocks: int = 8, max_waiting: int = 8, has_waits: bool = False
    ) -> None:
        self.hello = Hello(name, "both", incarnation, "host")
        self.reactor = Reactor()
        cache = LatentCache(CONFIG, blocks, torch.float32)
        for layer in cache.layers:
            layer.fill_(torch.nan)
        self.scheduler = Scheduler(BlockAllocator(blocks), 4, 48, max_waiting)
        self.requests = Requests(
            name, CONFIG, cache, self.scheduler, Tracer(), lambda _: {"worker": name}, kv_checksums=True
        )
        self.model, self.experts = ScriptedModel(cache), ScriptedExperts()
        self.engine = Engine(CONFIG, cast(DeepSeekModel, self.model), self.experts, self.requests)
        if has_waits:
            self.experts.has_waits, self.model.while_waiting = True, self.engine.meanwhile

    def listen(self) -> None:
        for event in self.reactor.poll(0):
            self.requests.handle(event)
        self.scheduler.check()

    def turn(self) -> bool:
        self.listen()
        try:
            busy: bool = self.engine.step()
        except RuntimeError as error:
            self.requests.fail_step(str(error))
            busy = False
        self.scheduler.check()
        return busy or self.requests.is_sending or any(link.queued_bytes for link in self.reactor.links())

    def close(self) -> None:
        self.reactor.close()

    def assert_idle(self) -> None:
        assert self.scheduler.all() == []
        assert self.scheduler.allocator.num_free == self.scheduler.allocator.num_total

    def assert_empty(self) -> None:
        requests = self.requests
        handovers, receiver = requests.handovers, requests.receiver
        assert [requests._sequences, receiver._receiving, requests.peers.outbox] == [{}, {}, {}]
        assert [handovers._open, handovers._accepted, handovers.sender._waiting] == [{}, [], {}]
        self.assert_idle()


@dataclass
class Heard:
    """What the front end knows of one request; `excused`: it lost a worker's link, which is an answer by itself."""

    num_prompt: int
    params: SamplingParams
    prefill: str
    decode: str
    tokens: dict[int, int] = field(default_factory=dict)
    finishes: list[str] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    prompt_logprobs: int = 0
    is_cancelled: bool = False
    is_excused: bool = False

    def check(self) -> None:
        ends = Counter(self.finishes)
        assert ends["stop"] + ends["length"] <= 1, self
        if ends["stop"] + ends["length"] and not self.is_cancelled and not self.is_excused:
            expected = answer_to(self.num_prompt, self.params)
            assert [self.tokens[index] for index in sorted(self.tokens)] == expected, self
        if not self.is_cancelled and not self.is_excused:
            assert self.finishes, f"never answered: {self}"


class Front:
    def __init__(self, name: str = "front-0") -> None:
        self.hello = Hello(name, "front", 1, "host")
        self.reactor = Reactor()
        self.links: dict[str, Link] = {}
        self.heard: dict[str, Heard] = {}

    def submit(
        self, prefill: str, decode: str, num_prompt: int, params: SamplingParams, deadline: float | None = None
    ) -> str:
        name = f"r{len(self.heard)}"
        self.heard[name] = Heard(num_prompt, params, prefill, decode)
        prompt = [5] * num_prompt
        until = time.time() + 3600 if deadline is None else deadline
        body = Submit(name, prompt, decode, params.to_wire(), {}, until, self.hello.name)
        self._send(prefill, Kind.SUBMIT, body.pack(), name)
        return name

    def cancel(self, name: str) -> None:
        heard = self.heard[name]
        heard.is_cancelled = True
        for worker in {heard.prefill, heard.decode}:
            self._send(worker, Kind.CANCEL, pack({"id": name}), name)

    def listen(self) -> None:
        for event in self.reactor.poll(0):
            if isinstance(event, Closed):
                self._lose(event.link)
            elif isinstance(event, Received) and event.message.kind == Kind.TOKENS:
                for item in unpack(event.message.meta)["items"]:
                    self._hear(self.heard[item["id"]], item)

    def _send(self, worker: str, kind: Kind, meta: bytes, name: str) -> None:
        try:
            self.links[worker].send(kind, meta)
        except (KeyError, LinkClosed):
            self.heard[name].is_excused = True

    def _lose(self, link: Link) -> None:
        for heard in self.heard.values():
            if link.peer.name in (heard.prefill, heard.decode):
                heard.is_excused = True

    def _hear(self, heard: Heard, item: dict[str, Any]) -> None:
        for offset, token in enumerate(item["token_ids"]):
            assert item["index"] + offset not in heard.tokens, f"a token came twice: {heard}"
            heard.tokens[item["index"] + offset] = token
        heard.prompt_logprobs += len(item.get("prompt_logprobs", []))
        if "finish" in item:
            heard.finishes.append(item["finish"])
        if "error" in item:
            heard.errors.append(item["error"])


class NarrowPipe(SocketPipe):
    """Has room for a few bytes, and again each time epoll tells of room."""

    BYTES = 1500
    room = BYTES

    def ready(self, fd: int, mask: int) -> None:
        super().ready(fd, mask)
        if mask & select.EPOLLOUT:
            self.room = self.BYTES

    def write(self, pieces: Items[Piece]) -> int:
        written = super().write([b"".join(pieces)[: self.room]])
        self.room -= written
        return written


def connect(
    one: Worker | Front,
    other: Worker | Front,
    pipe: type[SocketPipe] = SocketPipe,
    max_queued_bytes: int = DEFAULT_MAX_QUEUED_BYTES,
) -> tuple[Link, Link]:
    """A link whose ends are both here: (the end that `one` holds, the end that `other` holds)."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ends = (
        Link(other.hello, pipe(left, "unix"), max_queued_bytes),
        Link(one.hello, pipe(right, "unix"), max_queued_bytes),
    )
    for side, link in zip((one, other), ends, strict=True):
        if isinstance(side, Front):
            side.links[link.peer.name] = link
        side.reactor.add(link)
    return ends
