"""One request between its arrival at a front end and its last answer: state, trace span and figures."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from opentelemetry.trace import Span, Status, StatusCode

from ..actors.messages import Submit
from ..actors.tracing import Tracer
from .admission import Ticket
from .metrics import Metrics
from .request import Delta, FrontEndSettings, GenerateRequest, RequestRefused
from .streams import OutputStream


@dataclass(eq=False, slots=True)
class Flight:
    """`id` names one attempt: it is new for every submission, so what an earlier attempt still sends finds nobody."""

    request: GenerateRequest
    ticket: Ticket
    stream: OutputStream
    span: Span
    carrier: dict[str, str]
    timeout_s: float
    id: str = ""
    outbox: deque[Delta] = field(default_factory=deque)  # bounded by max_tokens
    refusal: RequestRefused | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None
    is_over: bool = False
    arrived_ns: int = field(default_factory=time.time_ns)
    placed_ns: int = 0
    first_token_ns: int = 0

    @property
    def deadline(self) -> float:
        """Unix time in seconds."""
        return self.arrived_ns / 1e9 + self.timeout_s

    def submit(self, name: str, front: str) -> Submit:
        assert self.ticket.placement is not None, f"{name} is submitted before it is placed"
        request, decode = self.request, self.ticket.placement.decode
        prompt, params = list(request.prompt_ids), request.params.to_wire()
        who = (request.priority, request.caller)
        return Submit(name, prompt, decode, params, self.carrier, self.deadline, front, *who)

    def settle(self, finish: str, error: str | None, metrics: Metrics) -> None:
        """Ends the span and counts the request. `finish`: stop, length, cancelled or the code of a refusal."""
        elapsed_s = (time.time_ns() - self.arrived_ns) / 1e9
        metrics.requests.labels(finish).inc()
        if finish in ("stop", "length"):
            metrics.request_duration.observe(elapsed_s)
            if self.stream.num_tokens > 1:
                decode_s = (time.time_ns() - self.first_token_ns) / 1e9
                metrics.time_per_output_token.observe(decode_s / (self.stream.num_tokens - 1))
        if self.placed_ns:
            self.span.set_attribute("gen_ai.latency.time_in_queue", (self.placed_ns - self.arrived_ns) / 1e9)
        if self.first_token_ns:
            ttft_s = (self.first_token_ns - self.arrived_ns) / 1e9
            self.span.set_attribute("gen_ai.latency.time_to_first_token", ttft_s)
        self.span.set_attribute("gen_ai.response.finish_reasons", [finish])
        self.span.set_attribute("gen_ai.usage.input_tokens", len(self.request.prompt_ids))
        self.span.set_attribute("gen_ai.usage.output_tokens", self.stream.num_tokens)
        self.span.set_attribute("braid.drafts.accepted", self.stream.num_accepted)
        self.span.set_attribute("braid.drafts.rejected", self.stream.num_rejected)
        if error is not None:
            self.span.set_attribute("error.type", finish)
            self.span.set_status(Status(StatusCode.ERROR, error))
        self.span.end()


def request_span(tracer: Tracer, settings: FrontEndSettings, request: GenerateRequest) -> Span:
    """The span of the whole request, child of the caller's; names are the GenAI conventions'."""
    params = request.params
    attributes = {
        "gen_ai.operation.name": request.operation,
        "gen_ai.provider.name": "braid",
        "gen_ai.request.model": settings.model_name,
        "gen_ai.response.model": settings.model_name,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.id": request.request_id,
        "braid.front_end": settings.name,
    }
    return tracer.start(f"{request.operation} {settings.model_name}", request.carrier, attributes)
