"""OpenTelemetry spans of request phases: one trace from the caller's `traceparent` to the last token.

Spans are made per request and phase, never per token or step, and mostly after the fact, from times taken on the way.
Where no collector is named, nothing of the SDK is imported and nothing is recorded; trace headers still pass through.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping

from opentelemetry.trace import (
    NoOpTracerProvider,
    Span,
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

Attributes = Mapping[str, AttributeValue]

# The one place where product code reads the environment: these names are the standard's, not ours, and the SDK
# itself would fall back to localhost when they are absent.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

logger = logging.getLogger(__name__)


class Tracer:
    """The tracer of one process. `Tracer()` records nothing."""

    def __init__(self, provider: TracerProvider | None = None, shutdown: Callable[[], None] | None = None) -> None:
        self.is_recording = provider is not None
        self._shutdown = shutdown
        self._tracer = (provider or NoOpTracerProvider()).get_tracer("braid")
        self._w3c = TraceContextTextMapPropagator()

    def start(self, name: str, carrier: Mapping[str, str], attributes: Attributes | None = None) -> Span:
        """A span that the caller ends; its parent is the one the carrier names."""
        context = self._w3c.extract(carrier)
        return self._tracer.start_span(name, context, SpanKind.SERVER, attributes)

    def carrier(self, span: Span) -> dict[str, str]:
        """W3C headers that make `span` the parent of what another process records."""
        headers: dict[str, str] = {}
        self._w3c.inject(headers, set_span_in_context(span))
        return headers

    def record(
        self,
        name: str,
        carrier: Mapping[str, str],
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        error: str | None = None,
    ) -> None:
        """A span that is over already; times are Unix time in nanoseconds."""
        if not self.is_recording:
            return
        span = self._tracer.start_span(
            name, self._w3c.extract(carrier), SpanKind.INTERNAL, attributes, start_time=start_ns
        )
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(end_time=end_ns)

    def close(self, timeout_s: float = 2.0) -> None:
        """Sends what is left. A collector that does not answer holds nothing up for longer than `timeout_s`."""
        if self._shutdown is not None:
            # the SDK's own flush ignores its timeout (opentelemetry-python #4568)
            flusher = threading.Thread(target=self._shutdown, name="tracing-flush", daemon=True)
            flusher.start()
            flusher.join(timeout_s)
        self._shutdown = None


def setup_tracer(service: str, instance: str) -> Tracer:
    """OTLP over HTTP when the standard OTEL_* variables name a collector, else a tracer that records nothing."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return Tracer()
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        logger.warning("no traces: %s is %r; Braid sends http/protobuf (usually port 4318)", PROTOCOLS[1], protocol)
        return Tracer()
    # costs 0.2 s and 15 MB: only for those who trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.instance.id": instance})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
        resource = resource.merge(Resource({"service.name": service}))
    provider = SdkTracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider, provider.shutdown)
