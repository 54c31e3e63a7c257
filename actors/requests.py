"""The requests of one attention worker: how they enter, where they stand, how each one ends.

A sequence enters by SUBMIT (a front end) or KV_OPEN (a prefill worker) and leaves by a finish, a cancel, a deadline or
a death; each of these frees its blocks at once and answers whoever waits.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from ..model.config import ModelConfig
from ..model.kv_cache import LatentCache
from ..model.sampler import SampledToken
from .kv_transfer import open_message, receive_layer, sequence_from_open
from .links import Link
from .messages import ErrorCode, Finish, Kind, Submit, TokenItem, WireLogprob, pack, unpack
from .peers import Peers
from .reactor import Closed, Event, Opened, Received
from .scheduler import Scheduler
from .sequence import Sequence, State
from .tracing import Attributes, Tracer

log = logging.getLogger(__name__)

NUM_TOMBSTONES = 4096  # cancelled ids remembered, for a KV_OPEN that was overtaken by its own cancel


class Requests:
    """Used by the engine's thread only."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        cache: LatentCache,
        scheduler: Scheduler,
        tracer: Tracer,
        describe_load: Callable[[], dict[str, Any]],
    ) -> None:
        self.name = name
        self.config = config
        self.cache = cache
        self.scheduler = scheduler
        self.tracer = tracer
        self.peers = Peers(describe_load)
        self.counters: Counter[str] = Counter()
        self._sequences: dict[str, Sequence] = {}
        self._receiving: dict[tuple[str, int], Sequence] = {}
        self._sent: dict[tuple[str, int], Sequence] = {}
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._sequences)

    # ---- events in

    def handle(self, event: Event) -> None:
        """One link event. What comes late from an earlier life of a peer is dropped (DESIGN law 3)."""
        name = event.link.peer.name
        if isinstance(event, Opened):
            self._on_opened(event)
        elif not self.peers.is_current(event):
            return
        elif isinstance(event, Closed):
            self.peers.remove(name)
            self._lose(name, event.reason)
        else:
            self._on_received(event)

    def _on_opened(self, event: Opened) -> None:
        """A peer's new link ends what hung on its old one: neither its numbers nor its blocks survived."""
        if old := self.peers.add(event.link):
            old.close("its peer has made another link")
            self._lose(event.link.peer.name, "it has come back without what it knew")

    def _on_received(self, event: Received) -> None:
        """Messages of kinds that are not ours (late expert rows) are dropped."""
        handler = self._handlers.get(event.message.kind)
        if handler is None:
            return
        try:
            handler(self, event)
        except Exception as error:  # one peer's bad message must not end everybody's requests
            log.exception("%s cannot take a message of %s", self.name, event.link.peer.name)
            event.link.close(f"{event.link.peer.name} sent a message that cannot be taken: {error}")

    def _on_submit(self, event: Received) -> None:
        sequence = Sequence.from_submit(Submit.unpack(event.message.meta))
        if sequence.target == self.name or sequence.params.max_tokens <= 1:
            sequence.target = ""  # nobody goes on with it after the prompt
        sequence.number, self._next_number = self._next_number, self._next_number + 1
        self._sequences[sequence.id] = sequence
        if not all(0 <= token < self.config.vocab_size for token in sequence.tokens) or not sequence.tokens:
            self.fail(sequence, "invalid", f"a prompt must have tokens, and none but 0 to {self.config.vocab_size - 1}")
        elif not self.scheduler.submit(sequence):
            self.fail(sequence, "busy", f"{self.name} has no room for a prompt of {sequence.num_prompt} tokens now")
        elif sequence.target:
            link = self.peers.link_to(sequence.target)
            if link is None or not self.peers.send(link, Kind.KV_OPEN, open_message(sequence)):
                self.fail(sequence, "unavailable", f"{self.name} has no link to decode worker {sequence.target}")
            else:
                self._sent[sequence.target, sequence.number] = sequence
        else:
            sequence.accepted = True

    def _on_cancel(self, event: Received) -> None:
        request_id = unpack(event.message.meta)["id"]
        self._cancelled[request_id] = None
        if len(self._cancelled) > NUM_TOMBSTONES:
            self._cancelled.popitem(last=False)
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.counters["cancelled"] += 1
            self._drop(sequence, "cancelled by its front end")

    def _on_kv_open(self, event: Received) -> None:
        sequence = sequence_from_open(event.message.meta, event.link.peer.name)
        if sequence.id in self._cancelled:
            reason = "cancelled"
        elif self.peers.link_to(sequence.front) is None:
            reason = f"{self.name} has no link to front end {sequence.front}"
        elif not self.scheduler.reserve(sequence):
            reason = f"{self.name} has {self.scheduler.allocator.num_free} free blocks"
        else:
            self._sequences[sequence.id] = sequence
            self._receiving[event.link.peer.name, sequence.number] = sequence
            self.peers.send(event.link, Kind.KV_ACCEPTED, pack({"number": sequence.number}))
            return
        self.peers.send(event.link, Kind.KV_REFUSED, pack({"number": sequence.number, "reason": reason}))

    def _on_kv_layer(self, event: Received) -> None:
        num_bytes = receive_layer(self.cache, self._receiving, event.link, event.message)
        self.counters["kv_bytes_in"] += num_bytes

    def _on_kv_done(self, event: Received) -> None:
        body = unpack(event.message.meta)
        sequence = self._receiving.pop((event.link.peer.name, body["number"]), None)
        if sequence is None:
            return
        expected = sequence.num_prompt * self.config.num_hidden_layers
        if sequence.rows_received != expected:
            told = f"{sequence.rows_received} of {expected} latent rows arrived from {event.link.peer.name}"
            self.fail(sequence, "internal", told)
            return
        sequence.num_computed = sequence.num_prompt
        sequence.tokens.append(body["token_id"])
        sequence.started_ns = time.time_ns()
        self.scheduler.start_decode(sequence)

    def _on_kv_abort(self, event: Received) -> None:
        sequence = self._receiving.pop((event.link.peer.name, unpack(event.message.meta)["number"]), None)
        if sequence is not None:
            self._forget(sequence)

    def _on_kv_accepted(self, event: Received) -> None:
        sequence = self._sent.get((event.link.peer.name, unpack(event.message.meta)["number"]))
        if sequence is not None:
            sequence.accepted = True
            if sequence.state == "handover":
                self._hand_over(sequence)

    def _on_kv_refused(self, event: Received) -> None:
        body = unpack(event.message.meta)
        sequence = self._sent.pop((event.link.peer.name, body["number"]), None)
        if sequence is not None:
            self.fail(sequence, "busy", f"decode worker {event.link.peer.name} refused: {body['reason']}")

    _handlers: dict[int, Callable[[Requests, Received], None]] = {  # noqa: RUF012 - a constant table
        Kind.SUBMIT: _on_submit,
        Kind.CANCEL: _on_cancel,
        Kind.KV_OPEN: _on_kv_open,
        Kind.KV_LAYER: _on_kv_layer,
        Kind.KV_DONE: _on_kv_done,
        Kind.KV_ABORT: _on_kv_abort,
        Kind.KV_ACCEPTED: _on_kv_accepted,
        Kind.KV_REFUSED: _on_kv_refused,
    }

    def _lose(self, name: str, reason: str) -> None:
        """A peer is gone: exactly the sequences that need it end, each with its reason (DESIGN law 2)."""
        for sequence in list(self._sequences.values()):
            if sequence.front == name:
                self._drop(sequence, f"front end {name} is gone")
            elif sequence.target == name:
                self.fail(sequence, "unavailable", f"decode worker {name} is gone: {reason}")
            elif sequence.source == name and sequence.state == "receiving":
                self.fail(sequence, "unavailable", f"prefill worker {name} is gone: {reason}")

    # ---- what a step brings

    def append(self, sequence: Sequence, token: SampledToken) -> None:
        sequence.tokens.append(token.token_id)
        finish = sequence.finish_reason(self.config.eos_token_ids)
        if finish:
            self.finish(sequence, self.item(sequence, [token], finish))
        elif sequence.state == "decode":
            self._emit(sequence, self.item(sequence, [token]))
        elif sequence.target:
            sequence.first_token, sequence.state = token, "handover"
            if sequence.accepted:
                self._hand_over(sequence)
        else:
            self._emit(sequence, self.item(sequence, [token]))
            self._trace_prefill(sequence)
            sequence.started_ns = time.time_ns()
            self.scheduler.start_decode(sequence)

    def _hand_over(self, sequence: Sequence) -> None:
        """The prompt's rows have left and the decode worker has room: it goes on from the first token."""
        token = sequence.first_token
        assert token is not None, f"{sequence.id} handed over without a first token"
        link = self.kv_link(sequence)
        done = pack({"number": sequence.number, "token_id": token.token_id})
        if link is None or not self.peers.send(link, Kind.KV_DONE, done):
            self.fail(sequence, "unavailable", f"decode worker {sequence.target} is gone")
            return
        del self._sent[sequence.target, sequence.number]
        self._emit(sequence, self.item(sequence, [token]))
        self._trace_prefill(sequence)
        attributes: Attributes = {"braid.kv.bytes": sequence.kv_bytes, "braid.to": sequence.target}
        self.tracer.record("kv_transfer", sequence.carrier, sequence.kv_started_ns, time.time_ns(), attributes)
        self.counters["kv_bytes_out"] += sequence.kv_bytes
        self._forget(sequence)

    def kv_link(self, sequence: Sequence) -> Link | None:
        return self.peers.link_to(sequence.target) if (sequence.target, sequence.number) in self._sent else None

    # ---- ends

    def finish(self, sequence: Sequence, item: TokenItem) -> None:
        self._emit(sequence, item)
        self.counters["finished"] += 1
        if sequence.state == "decode":
            attributes: Attributes = {"braid.worker": self.name, "gen_ai.usage.output_tokens": sequence.num_generated}
            self.tracer.record("decode", sequence.carrier, sequence.started_ns, time.time_ns(), attributes)
        else:
            self._trace_prefill(sequence)
        self._drop(sequence, "finished")

    def fail(self, sequence: Sequence, code: ErrorCode, message: str) -> None:
        item = TokenItem(sequence.id, sequence.num_generated, finish="error", error={"code": code, "message": message})
        self._emit(sequence, item)
        self.counters["failed"] += 1
        self._drop(sequence, message)

    def _drop(self, sequence: Sequence, reason: str) -> None:
        """Forgets a sequence here and, if its rows are on their way, at the decode worker."""
        link = self.kv_link(sequence)
        if link is not None:
            self.peers.send(link, Kind.KV_ABORT, pack({"number": sequence.number, "reason": reason}))
        self._sent.pop((sequence.target, sequence.number), None)
        self._receiving.pop((sequence.source, sequence.number), None)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._sequences.pop(sequence.id, None)
        self.scheduler.finish(sequence)

    def fail_all(self, code: ErrorCode, message: str, *states: State) -> None:
        """Ends every sequence, or those in the given states, with the same error."""
        for sequence in list(self._sequences.values()):
            if not states or sequence.state in states:
                self.fail(sequence, code, message)
        self.peers.flush()

    def fail_step(self, message: str) -> None:
        """After a step that raised: what waits or is computed elsewhere had no part in it."""
        self.fail_all("internal", message, "prefill", "handover", "decode")

    def expire(self) -> None:
        now = time.time()
        for sequence in [s for s in self._sequences.values() if s.deadline <= now]:
            self.fail(sequence, "deadline", f"the deadline passed after {sequence.num_generated} tokens")

    # ---- messages out

    def item(self, sequence: Sequence, tokens: list[SampledToken], finish: Finish | None = None) -> TokenItem:
        wanted = sequence.params.logprobs is not None
        first = not tokens or sequence.num_generated == 1
        return TokenItem(
            sequence.id,
            index=sequence.num_generated - len(tokens),
            token_ids=[token.token_id for token in tokens],
            logprobs=[wire_logprob(token) for token in tokens] if wanted else None,
            prompt_logprobs=sequence.prompt_logprobs if first and sequence.prompt_logprobs else None,
            finish=finish,
            timing={"queue_s": (sequence.started_ns - sequence.arrived_ns) / 1e9} if first else {},
        )

    def _emit(self, sequence: Sequence, item: TokenItem) -> None:
        self.counters["generated"] += len(item.token_ids)
        self.peers.emit(sequence.front, item)

    def _trace_prefill(self, sequence: Sequence) -> None:
        attributes: Attributes = {"braid.worker": self.name, "gen_ai.usage.input_tokens": sequence.num_prompt}
        self.tracer.record("prefill", sequence.carrier, sequence.started_ns, time.time_ns(), attributes)


def wire_logprob(token: SampledToken) -> WireLogprob:
    return [token.logprob, [list(pair) for pair in token.top]]
