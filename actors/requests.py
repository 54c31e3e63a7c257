"""The requests of one attention worker: how they enter, where they stand, how each one ends.

A sequence enters by SUBMIT (a front end) or KV_OPEN (a prefill worker) and leaves by a finish, a cancel, a deadline or
a death; each of these frees its blocks at once and answers whoever waits.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ..model.config import ModelConfig
from ..model.kv_cache import LatentCache
from ..model.sampler import SampledToken
from .cache_memory import memory_of
from .kv_sender import KvSender, LayerSender, Span
from .kv_transfer import Damaged, missing_rows, open_message, receive_layer, sequence_from_open
from .links import Link
from .messages import ErrorCode, Finish, Kind, Submit, TokenItem, WireLogprob, pack, unpack
from .peers import Peers
from .reactor import Closed, Event, Opened, Received
from .request_checks import check_fields, check_request, check_tokens
from .scheduler import Plan, Scheduler
from .sequence import Sequence, State
from .speculation import MAX_DEPTH
from .tracing import Attributes, Tracer

log = logging.getLogger(__name__)

MAX_NUMBER = 2**32 - 1  # as KV_LAYER has room for
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
        describe_load: Callable[[bool], dict[str, Any]],
        kv_checksums: bool = False,
    ) -> None:
        self.name = name
        self.config = config
        self.cache = cache
        self.scheduler = scheduler
        self.tracer = tracer
        self.kv_checksums = kv_checksums
        self._memory = memory_of(cache)
        self._kv_sender = KvSender(self._memory, len(cache.layers), kv_checksums)
        self._layer_sender = LayerSender(self._kv_sender, [])
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
        check_fields(sequence)
        if sequence.front != event.link.peer.name or sequence.id in self._sequences:
            raise ValueError(f"{sequence.id} of {sequence.front} is under way, or of another front end")
        reason = self._unfit(sequence)
        if sequence.target == self.name or reason or sequence.params.max_tokens <= 1:
            sequence.target = ""  # nobody goes on with it after the prompt
        sequence.number, self._next_number = self._next_number, self._next_number % MAX_NUMBER + 1
        self._sequences[sequence.id] = sequence
        if reason:
            self.fail(sequence, "invalid", reason)
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
        sequence, code = sequence_from_open(event.message.meta, event.link.peer.name), "busy"
        check_fields(sequence)
        if (sequence.source, sequence.number) in self._receiving:
            raise ValueError(f"number {sequence.number} is under way")
        if reason := self._unfit(sequence):
            code = "invalid"
        elif sequence.id in self._cancelled:
            reason = "cancelled"
        elif sequence.id in self._sequences:
            reason = f"{self.name} has a request {sequence.id} already"
        elif self.peers.link_to(sequence.front) is None:
            reason = f"{self.name} has no link to front end {sequence.front}"
        elif not self.scheduler.reserve(sequence):
            reason = f"{self.name} has {self.scheduler.allocator.num_free} free blocks"
        else:
            self._sequences[sequence.id] = sequence
            self._receiving[event.link.peer.name, sequence.number] = sequence
            sequence.kv_missing = missing_rows(sequence, len(self.cache.layers))
            accepted = {"number": sequence.number, "have": sequence.cached_tokens}
            self.peers.send(event.link, Kind.KV_ACCEPTED, pack(accepted))
            return
        refused = {"number": sequence.number, "code": code, "reason": reason}
        self.peers.send(event.link, Kind.KV_REFUSED, pack(refused))

    def _unfit(self, sequence: Sequence) -> str:
        """Why this model cannot serve it; empty if it can."""
        try:
            check_request(sequence, self.config)
        except ValueError as error:
            return str(error)
        return ""

    def _on_kv_layer(self, event: Received) -> None:
        try:
            receive_layer(self._memory, self._receiving, event.link, event.message, self.kv_checksums)
        except Damaged as error:
            self.counters["kv_damaged"] += 1
            log.warning("%s", error)

    def _on_kv_done(self, event: Received) -> None:
        body = unpack(event.message.meta)
        sequence = self._receiving.pop((event.link.peer.name, body["number"]), None)
        if sequence is None:
            return
        check_tokens([body["token_id"], *body["drafts"]], self.config)
        sequence.tokens.append(body["token_id"])
        sequence.started_ns = time.time_ns()
        self.counters["kv_bytes_in"] += sequence.kv_bytes
        if num_missing := sum(layer.bit_count() for layer in sequence.kv_missing):
            log.warning(
                "%s: %d rows have not arrived from %s: computed here", sequence.id, num_missing, sequence.source
            )
            self.scheduler.recompute(sequence)
            return
        sequence.num_computed = sequence.num_prompt
        sequence.drafts = body["drafts"][:MAX_DEPTH]
        self.scheduler.start_decode(sequence)

    def _on_kv_abort(self, event: Received) -> None:
        sequence = self._receiving.pop((event.link.peer.name, unpack(event.message.meta)["number"]), None)
        if sequence is not None:
            self._forget(sequence)

    def _on_kv_accepted(self, event: Received) -> None:
        body = unpack(event.message.meta)
        sequence = self._sent.get((event.link.peer.name, body["number"]))
        if sequence is not None:
            if type(body["have"]) is not int or not 0 <= body["have"] <= sequence.num_prompt:
                raise ValueError(f"it has {body['have']} positions of a prompt of {sequence.num_prompt} tokens")
            sequence.accepted, sequence.kv_have = True, body["have"]
            if sequence.state == "handover":
                self._hand_over(sequence)

    def _on_kv_refused(self, event: Received) -> None:
        body = unpack(event.message.meta)
        sequence = self._sent.pop((event.link.peer.name, body["number"]), None)
        if sequence is not None:
            self.fail(sequence, body["code"], f"decode worker {event.link.peer.name} refused: {body['reason']}")

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

    def append(self, sequence: Sequence, tokens: list[SampledToken]) -> None:
        """What a step has sampled for one sequence: a token, and more where drafts came true."""
        sequence.tokens += [token.token_id for token in tokens]
        finish = sequence.finish_reason(self.config.eos_token_ids)
        if finish:
            self.finish(sequence, self.item(sequence, tokens, finish))
        elif sequence.state == "decode":
            self._emit(sequence, self.item(sequence, tokens))
        elif sequence.target:
            sequence.first_token, sequence.state = tokens[0], "handover"
        else:
            self._emit(sequence, self.item(sequence, tokens))
            self._trace_prefill(sequence)
            sequence.started_ns = time.time_ns()
            self.scheduler.start_decode(sequence)

    def layer_sender(self, plan: Plan, is_whole: Callable[[], bool]) -> LayerSender:
        """The `on_layer` hook of a step: every layer's new prompt rows leave as soon as it has run.

        `is_whole`: whether the pass that runs has lost no rows so far.
        """
        take, spans = self._kv_sender.take, list[Span]()
        for chunk in plan:
            if not chunk.absorbed and (link := self.kv_link(chunk.sequence)):
                spans += take(chunk.sequence, link, chunk.start, chunk.start + chunk.num)
        self.send_waiting()
        self._layer_sender = LayerSender(self._kv_sender, spans, is_whole)
        return self._layer_sender

    def hand_over_ready(self, plan: Plan) -> None:
        """At the end of a step: whose first token is known goes to its decode worker, if that one has accepted."""
        self._layer_sender.finish()
        for chunk in plan:
            if chunk.sequence.state == "handover" and chunk.sequence.accepted:
                self._hand_over(chunk.sequence)
        self.send_waiting()

    def send_waiting(self) -> None:
        """Rows that links had no room for; whose last ones leave is handed over."""
        for sequence in self._kv_sender.drain():
            if sequence.state == "handover" and sequence.accepted:
                self._hand_over(sequence)

    def _hand_over(self, sequence: Sequence) -> None:
        """The decode worker has room and the first token is known: it goes on from there, once all rows have left."""
        token, link = sequence.first_token, self.kv_link(sequence)
        assert token is not None, f"{sequence.id} handed over without a first token"
        if link is not None:
            self._kv_sender.take(sequence, link, sequence.num_prompt, sequence.num_prompt)
            if self._kv_sender.is_waiting(sequence):
                return
        done = pack({"number": sequence.number, "token_id": token.token_id, "drafts": sequence.drafts})
        if link is None or not self.peers.send(link, Kind.KV_DONE, done):
            self.fail(sequence, "unavailable", f"decode worker {sequence.target} is gone")
            return
        del self._sent[sequence.target, sequence.number]
        self._emit(sequence, self.item(sequence, [token], transfer=self._note_transfer(sequence)))
        self._trace_prefill(sequence)
        self._forget(sequence)

    def _note_transfer(self, sequence: Sequence) -> dict[str, float]:
        """Counts and traces it. `kv_send_s` is the part of its time in which nothing else was done."""
        now = time.time_ns()
        started_ns = sequence.kv_started_ns or now  # 0: the decode worker held every row
        spent = {"kv_s": (now - started_ns) / 1e9, "kv_send_s": sequence.kv_send_ns / 1e9}
        attributes: Attributes = {
            "braid.kv.bytes": sequence.kv_bytes,
            "braid.kv.send_s": spent["kv_send_s"],
            "braid.kv.tokens_held": sequence.kv_have,
            "braid.to": sequence.target,
        }
        self.tracer.record("kv_transfer", sequence.carrier, started_ns, now, attributes)
        self.counters["kv_bytes_out"] += sequence.kv_bytes
        return {**spent, "kv_bytes": sequence.kv_bytes}

    @property
    def is_sending(self) -> bool:
        """Whether rows that wait could leave at once: a round of the serving thread sends some, not all."""
        return self._kv_sender.has_room

    def kv_link(self, sequence: Sequence) -> Link | None:
        return self.peers.link_to(sequence.target) if (sequence.target, sequence.number) in self._sent else None

    # ---- ends

    def finish(self, sequence: Sequence, item: TokenItem) -> None:
        self._emit(sequence, item)
        self.counters["finished"] += 1
        if sequence.state == "decode":
            attributes: Attributes = {
                "braid.worker": self.name,
                "gen_ai.usage.output_tokens": sequence.num_generated,
                "braid.drafts.accepted": item.accepted,
                "braid.drafts.rejected": item.rejected,
            }
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
        self._kv_sender.forget(sequence)
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

    def item(
        self,
        sequence: Sequence,
        tokens: list[SampledToken],
        finish: Finish | None = None,
        transfer: Mapping[str, float] | None = None,
    ) -> TokenItem:
        wanted = sequence.params.logprobs is not None
        first = not tokens or sequence.num_generated == len(tokens)
        drafting = sequence.drafting
        return TokenItem(
            sequence.id,
            index=sequence.num_generated - len(tokens),
            token_ids=[token.token_id for token in tokens],
            logprobs=[wire_logprob(token) for token in tokens] if wanted else None,
            prompt_logprobs=sequence.prompt_logprobs if first and sequence.prompt_logprobs else None,
            finish=finish,
            cached=sequence.cached_tokens if first else 0,
            accepted=drafting.num_accepted if drafting else 0,
            rejected=drafting.num_drafted - drafting.num_accepted if drafting else 0,
            timing={"queue_s": (sequence.started_ns - sequence.arrived_ns) / 1e9, **(transfer or {})} if first else {},
        )

    def _emit(self, sequence: Sequence, item: TokenItem) -> None:
        self.counters["generated"] += len(item.token_ids)
        self.peers.emit(sequence.front, item)

    def _trace_prefill(self, sequence: Sequence) -> None:
        attributes: Attributes = {"braid.worker": self.name, "gen_ai.usage.input_tokens": sequence.num_prompt}
        self.tracer.record("prefill", sequence.carrier, sequence.started_ns, time.time_ns(), attributes)


def wire_logprob(token: SampledToken) -> WireLogprob:
    return [token.logprob, [list(pair) for pair in token.top]]
