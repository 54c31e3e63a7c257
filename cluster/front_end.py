"""Turns requests into streams of text: admits, places, submits over links, orders tokens, detokenizes, stops.

Every request that enters `generate` is answered: by its last delta or by RequestRefused. It holds a place in the
queue or blocks on a worker only until then, whoever ends it: the model, a stop string, the caller, the deadline or
a worker's death.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ..actors.messages import Kind, pack
from ..actors.tracing import Tracer
from ..actors.view import ClusterView
from ..model.tokenizer import Tokenizer
from .admission import BUSY_PAUSE_S, Admission, Ticket
from .flight import Flight, request_span
from .front_links import FrontLinks, Joined, Left, News, Told
from .metrics import Metrics
from .request import Delta, FrontEndSettings, GenerateRequest, RefusalCode, RequestRefused, check_request
from .streams import OutputStream, TokenItem

RETRY_AFTER_S = 1.0
NOBODY_LINKED = "no prefill or no decode worker is linked: the cluster is starting, or lost them"

log = logging.getLogger(__name__)


class FrontEnd:
    """Core of one front end; HTTP and gRPC stand on top. One asyncio loop runs all of it."""

    def __init__(self, settings: FrontEndSettings, tokenizer: Tokenizer, tracer: Tracer | None = None) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.tracer = tracer or Tracer()
        self.admission = Admission(settings.max_waiting)
        self.metrics = Metrics(lambda: self.admission.num_waiting, self._loads)
        self._links: FrontLinks | None = None
        self._flights: dict[str, Flight] = {}  # placed, by the id of their attempt
        self._waiting: dict[Ticket, Flight] = {}
        self._numbers = itertools.count(1)
        self._is_pump_due = self._is_closed = self._was_ready = False
        self._ready_watchers: list[Callable[[bool], None]] = []

    # ---- what HTTP, gRPC and the controller call

    async def apply(self, view: ClusterView) -> None:
        """Links to the view's attention workers; returns when each was dialled once. May be called again and again."""
        if self._is_closed:
            return
        if self._links is None:  # binds the front end to this loop
            self._links = FrontLinks(self.settings, self._on_news)
        await self._links.apply(view)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Deltas until the last, which has the finish reason. Raises RequestRefused, at once or later.

        Close the iterator (contextlib.aclosing) to cancel: that frees the sequence's blocks.
        """
        flight = self._take_off(request)
        try:
            while True:
                while flight.outbox:
                    yield flight.outbox.popleft()
                if flight.refusal is not None:
                    raise flight.refusal
                if flight.is_over:
                    return
                flight.wake.clear()
                await flight.wake.wait()  # the timer of the flight bounds it
        finally:
            if not flight.is_over:
                self._cancel(flight)
                self._end(flight, "cancelled")

    @property
    def ready(self) -> bool:
        """A prompt could be computed and gone on with: a worker for each has told its load."""
        return not self._is_closed and self.admission.is_ready

    def watch_ready(self, watcher: Callable[[bool], None]) -> Callable[[], None]:
        """Tells the watcher now, and whenever it changes; returns what ends that."""
        self._ready_watchers.append(watcher)
        watcher(self.ready)
        return lambda: self._ready_watchers.remove(watcher)

    async def wait_ready(self, timeout_s: float) -> bool:
        """Returns once the front end is ready: True; False when it has not become so in time."""
        readied = asyncio.Event()
        unwatch = self.watch_ready(lambda is_ready: readied.set() if is_ready else None)
        try:
            await asyncio.wait_for(readied.wait(), timeout_s)
        except TimeoutError:
            return False
        finally:
            unwatch()
        return True

    def load(self) -> dict[str, Any]:
        return {
            "name": self.settings.name,
            "ready": self.ready,
            "running": len(self._flights),
            "waiting": self.admission.num_waiting,
            "workers": self._loads(),
        }

    async def close(self) -> None:
        """Answers everything still open with "unavailable" and closes the links."""
        self._is_closed = True
        for flight in [*self._flights.values(), *self._waiting.values()]:
            self._cancel(flight)
            self._refuse(flight, "unavailable", f"front end {self.settings.name} is closing")
        self._tell_ready()
        if self._links is not None:
            await self._links.close()

    # ---- a request comes in

    def _take_off(self, request: GenerateRequest) -> Flight:
        limit = self.settings.request_timeout_s
        timeout_s = limit if request.timeout_s is None else min(request.timeout_s, limit)
        span = request_span(self.tracer, self.settings, request)
        flight = Flight(
            request,
            Ticket(
                next(self._numbers),
                len(request.prompt_ids),
                request.params.max_tokens,
                request.prompt_ids,
                request.priority,
                request.caller,
            ),
            OutputStream(request.prompt_ids, request.params, request.stop, self.tokenizer.decoder()),
            span,
            self.tracer.carrier(span),
            timeout_s,
        )
        try:
            self._check(flight)
        except RequestRefused as refused:
            self._end(flight, refused.code, refused.message)
            raise
        flight.timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, flight)
        if flight.ticket.placement is None:
            self._waiting[flight.ticket] = flight
        else:
            self._submit(flight)
        return flight

    def _check(self, flight: Flight) -> None:
        """Is placed, joins the queue or raises RequestRefused."""
        try:
            check_request(flight.request, self.settings)
        except ValueError as error:
            raise RequestRefused("invalid", str(error)) from error
        if flight.timeout_s <= 0:
            raise RequestRefused("deadline", "the deadline had passed when the request arrived")
        if not self.ready:
            raise RequestRefused("unavailable", NOBODY_LINKED, RETRY_AFTER_S)
        if never := self.admission.why_never(flight.ticket):
            raise RequestRefused("invalid", never)
        self._pump()  # a queue that could move now is not full
        if not self.admission.join(flight.ticket, time.monotonic()):
            told = f"{self.admission.num_waiting} requests wait already (max_waiting): try again later"
            crowd = self.admission.crowded_out(flight.ticket)
            if crowd is None:
                raise RequestRefused("busy", told, RETRY_AFTER_S)
            self._refuse(self._waiting[crowd], "busy", told)
            self.admission.join(flight.ticket, time.monotonic())

    def _pump_soon(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        for ticket in self.admission.place_waiting(time.monotonic()):
            self._submit(self._waiting.pop(ticket))

    def _submit(self, flight: Flight) -> None:
        placement = flight.ticket.placement
        assert placement is not None, "submitted without a placement"
        flight.id = f"{self.settings.name}#{self.settings.incarnation}-{next(self._numbers)}"
        flight.placed_ns = time.time_ns()
        self._flights[flight.id] = flight
        submit = flight.submit(flight.id, self.settings.name)
        if error := self._send(placement.prefill, Kind.SUBMIT, submit.pack()):
            self._refuse(flight, "unavailable", f"prefill worker {placement.prefill} cannot be reached: {error}")

    # ---- the workers speak

    def _on_news(self, batch: list[News]) -> None:
        for news in batch:
            if isinstance(news, Joined):
                self.admission.link(news.worker, news.role)
            elif isinstance(news, Left):
                self._on_left(news)
            elif news.kind in (Kind.LOAD, Kind.TOKENS):
                self._on_told(news)
        self._tell_ready()
        self._pump_soon()

    def _on_told(self, told: Told) -> None:
        self.admission.report(told.body["load"])
        num_tokens = 0
        for item in told.body.get("items", ()):
            flight = self._flights.get(item["id"])
            if flight is None:
                continue  # it has ended here: cancelled, or another attempt of it is on its way
            before = flight.stream.num_tokens
            try:
                self._on_item(flight, told.worker, item)
            except Exception as error:  # one request's output must not stop the others'
                log.exception("%s cannot read %r", self.settings.name, item)
                self._cancel(flight)
                self._refuse(flight, "internal", f"the output of {told.worker} cannot be read: {error}")
            num_tokens += flight.stream.num_tokens - before
        if num_tokens:
            self.metrics.generation_tokens.inc(num_tokens)

    def _on_item(self, flight: Flight, worker: str, item: TokenItem) -> None:
        error = item.get("error")
        if error or item.get("finish") in ("error", "cancelled"):
            self._on_error(flight, worker, error or {"code": "unavailable", "message": f"{worker} cancelled it"})
            return
        self.admission.note_token(flight.ticket, worker)
        deltas = list(flight.stream.push(item))
        if deltas and not flight.first_token_ns:
            flight.first_token_ns = time.time_ns()
            self.metrics.time_to_first_token.observe((flight.first_token_ns - flight.arrived_ns) / 1e9)
            self.metrics.prompt_tokens.inc(len(flight.request.prompt_ids))
            self.metrics.note_transfer(item.get("timing") or {})
        flight.outbox.extend(deltas)
        flight.wake.set()
        if flight.stream.is_done:
            if flight.stream.is_cut:
                self._cancel(flight)
            self._end(flight, deltas[-1].finish_reason or "stop")

    def _on_error(self, flight: Flight, worker: str, error: dict[str, str]) -> None:
        is_untouched = flight.stream.num_tokens == 0 and not flight.stream.early
        if error["code"] == "busy" and is_untouched:
            self._requeue(flight, error.get("by", worker))
            return
        codes: dict[str, RefusalCode] = {code: code for code in ("busy", "unavailable", "deadline", "invalid")}
        self._cancel(flight, spared=worker)
        self._refuse(flight, codes.get(error["code"], "internal"), error["message"])

    def _requeue(self, flight: Flight, worker: str) -> None:
        """The worker's view of its room was newer than ours: the request waits again, at its old place."""
        del self._flights[flight.id]
        self.admission.rejoin(flight.ticket)
        self._waiting[flight.ticket] = flight
        self.admission.pause(worker, time.monotonic())  # only it: others may have room
        asyncio.get_running_loop().call_later(BUSY_PAUSE_S, self._pump_soon)

    def _on_left(self, left: Left) -> None:
        for flight in [flight for flight in self._flights.values() if flight.ticket.depends_on(left.worker)]:
            self._cancel(flight, spared=left.worker)
            placement = flight.ticket.placement
            role = "decode" if placement is not None and placement.decode == left.worker else "prefill"
            self._refuse(flight, "unavailable", f"{role} worker {left.worker} was lost: {left.reason}")
        self.admission.unlink(left.worker)
        for flight in list(self._waiting.values()):  # nobody waits for what is not to be had any more
            if told := self.admission.why_never(flight.ticket) if self.admission.is_ready else NOBODY_LINKED:
                self._refuse(flight, "unavailable", told)

    # ---- a request ends

    def _expire(self, flight: Flight) -> None:
        where = "in the queue" if flight.ticket.placement is None else f"after {flight.stream.num_tokens} tokens"
        self._cancel(flight)
        self._refuse(flight, "deadline", f"the deadline of {flight.timeout_s:g} s passed {where}")

    def _cancel(self, flight: Flight, spared: str = "") -> None:
        """Frees what the request holds on its workers, except on one that knows already."""
        placement = flight.ticket.placement
        if placement is None:
            return
        holders = {placement.decode} if flight.ticket.is_prefilled else {placement.prefill, placement.decode}
        for worker in holders - {spared}:
            self._send(worker, Kind.CANCEL, pack({"id": flight.id}))

    def _refuse(self, flight: Flight, code: RefusalCode, message: str) -> None:
        if not flight.is_over:
            retry_after_s = RETRY_AFTER_S if code in ("busy", "unavailable") else None
            flight.refusal = RequestRefused(code, message, retry_after_s)
            flight.wake.set()
            self._end(flight, code, message)

    def _end(self, flight: Flight, finish: str, error: str | None = None) -> None:
        assert not flight.is_over, f"request {flight.id} ended twice"
        flight.is_over = True
        if flight.timer is not None:
            flight.timer.cancel()
        self._flights.pop(flight.id, None)
        self._waiting.pop(flight.ticket, None)
        self.admission.release(flight.ticket)
        flight.settle(finish, error, self.metrics)
        self._pump_soon()

    # ---- small things

    def _send(self, worker: str, kind: Kind, meta: bytes) -> str | None:
        return self._links.send(worker, kind, meta) if self._links is not None else "no links yet"

    def _loads(self) -> list[dict[str, Any]]:
        return [worker.load for worker in self.admission.workers.values() if worker.load is not None]

    def _tell_ready(self) -> None:
        if self.ready != self._was_ready:
            self._was_ready = self.ready
            for watcher in self._ready_watchers:
                watcher(self.ready)
