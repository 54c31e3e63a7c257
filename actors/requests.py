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
from .answers import item_of, trace_decode, trace_prefill, trace_transfer
from .cache_memory import memory_of
from .handovers import Handovers
from .kv_receiver import Damaged, KvReceiver
from .kv_sender import KvSender, LayerSender
from .kv_transfer import sequence_from_open
from .messages import ErrorCode, Kind, Submit, TokenItem, pack, unpack
from .peers import Peers
from .reactor import Closed, Event, Opened, Received
from .request_checks import check_fields, check_request, check_tokens
from .scheduler import Plan, Scheduler
from .sequence import Sequence, State
from .speculation import MAX_DEPTH
from .tracing import Tracer

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
        self.peers = Peers(describe_load)
        memory, num_layers = memory_of(cache), len(cache.layers)
        self.handovers = Handovers(self.peers, KvSender(memory, num_layers, kv_checksums))
        self.receiver = KvReceiver(memory, num_layers, kv_checksums)
        self.counters: Counter[str] = Counter()
        self._sequences: dict[str, Sequence] = {}
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
        elif sequence.target and not self.handovers.open(sequence):
            self.fail(sequence, "unavailable", f"{self.name} has no link to decode worker {sequence.target}")

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
        if self.receiver.is_open(sequence):
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
            self.receiver.open(sequence)
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
            self.receiver.receive(event.link, event.message)
        except Damaged as error:
            self.counters["kv_damaged"] += 1
            log.warning("%s", error)

    def _on_kv_done(self, event: Received) -> None:
        body = unpack(event.message.meta)
        sequence = self.receiver.take(event.link.peer.name, body["number"])
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
        sequence = self.receiver.take(event.link.peer.name, unpack(event.message.meta)["number"])
        if sequence is not None:
            self._forget(sequence)

    def _on_kv_accepted(self, event: Received) -> None:
        self.handovers.accept(event)

    def _on_kv_refused(self, event: Received) -> None:
        body = unpack(event.message.meta)
        sequence = self.handovers.take(event.link.peer.name, body["number"])
        if sequence is not None:
            peer = event.link.peer.name
            self.fail(sequence, body["code"], f"decode worker {peer} refused: {body['reason']}", by=peer)

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
            self.finish(sequence, item_of(sequence, tokens, finish))
        elif sequence.state == "decode":
            self._emit(sequence, item_of(sequence, tokens))
        elif sequence.target:
            sequence.first_token, sequence.state = tokens[0], "handover"
        else:
            self._emit(sequence, item_of(sequence, tokens))
            trace_prefill(self.tracer, self.name, sequence)
            sequence.started_ns = time.time_ns()
            self.scheduler.start_decode(sequence)

    def layer_sender(self, plan: Plan, is_whole: Callable[[], bool]) -> LayerSender:
        """The `on_layer` hook of a step. `is_whole`: whether the pass that runs has lost no rows so far."""
        on_layer = self.handovers.layer_sender(plan, is_whole)
        self.hand_over([])
        return on_layer

    def hand_over(self, plan: Plan) -> None:
        """Between two passes, the last of which ran `plan`: KV rows leave, and who has all of them there follows."""
        for sequence in self.handovers.ready(plan):
            ended_ns = time.time_ns()  # before the decode worker hears of it: it may be done before we run on
            if not self.handovers.complete(sequence):
                self.fail(sequence, "unavailable", f"decode worker {sequence.target} is gone")
                continue
            self.counters["kv_bytes_out"] += sequence.kv_bytes
            transfer = trace_transfer(self.tracer, sequence, ended_ns)
            assert sequence.first_token is not None, f"{sequence.id} handed over without a first token"
            self._emit(sequence, item_of(sequence, [sequence.first_token], transfer=transfer))
            trace_prefill(self.tracer, self.name, sequence)
            self._forget(sequence)

    @property
    def is_sending(self) -> bool:
        """Whether KV rows that wait could leave at once: a round of the serving thread sends some, not all."""
        return self.handovers.sender.has_room

    # ---- ends

    def finish(self, sequence: Sequence, item: TokenItem) -> None:
        self._emit(sequence, item)
        self.counters["finished"] += 1
        if sequence.state == "decode":
            trace_decode(self.tracer, self.name, sequence, item)
        else:
            trace_prefill(self.tracer, self.name, sequence)
        self._drop(sequence, "finished")

    def fail(self, sequence: Sequence, code: ErrorCode, message: str, by: str = "") -> None:
        """`by`: who has refused it, if it is not this worker."""
        error = {"code": code, "message": message, "by": by or self.name}
        item = TokenItem(sequence.id, sequence.num_generated, finish="error", error=error)
        self._emit(sequence, item)
        self.counters["failed"] += 1
        self._drop(sequence, message)

    def _drop(self, sequence: Sequence, reason: str) -> None:
        """Forgets a sequence here and, if its rows are on their way, at the decode worker."""
        self.handovers.drop(sequence, reason)
        self.receiver.take(sequence.source, sequence.number)
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

    def _emit(self, sequence: Sequence, item: TokenItem) -> None:
        self.counters["generated"] += len(item.token_ids)
        self.peers.emit(sequence.front, item)
