from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.trace import NoOpTracerProvider
from otlp_collector import Collector
from waiting import LIMIT_S

from braid.actors.tracing import Tracer, setup_tracer

CALLER = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=1"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    for name, value in collector.environment.items():
        monkeypatch.setenv(name, value)
    yield collector
    collector.close()


def test_one_trace_from_the_caller_through_two_processes(collector: Collector) -> None:
    front, worker = setup_tracer("braid-front", "front-0"), setup_tracer("braid-decode", "decode-0")
    span = front.start("chat tiny", CALLER, {"gen_ai.request.model": "tiny"})
    carrier = front.carrier(span)
    worker.record("prefill", carrier, 1_000, 2_000, {"gen_ai.usage.input_tokens": 7})
    worker.record("decode", carrier, 2_000, 3_000, error="the expert is gone")
    span.end()
    worker.close(LIMIT_S)
    front.close(LIMIT_S)
    request, prefill, decode = sorted(collector.spans, key=lambda span: span.name != "chat tiny")
    assert (
        request.trace_id.hex() == prefill.trace_id.hex() == decode.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    )
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert prefill.parent_span_id == decode.parent_span_id == request.span_id
    assert (prefill.start_time_unix_nano, prefill.end_time_unix_nano) == (1_000, 2_000)
    assert [(pair.key, pair.value.int_value) for pair in prefill.attributes] == [("gen_ai.usage.input_tokens", 7)]
    assert (decode.status.code, decode.status.message) == (2, "the expert is gone")
    assert carrier["tracestate"] == "vendor=1"
    named = {resource["service.name"]: resource["service.instance.id"] for resource in collector.resources}
    assert named == {"braid-front": "front-0", "braid-decode": "decode-0"}


def test_the_standards_service_name_wins(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    tracer = setup_tracer("braid", "x")
    tracer.record("decode", {}, 1, 2)
    tracer.close(LIMIT_S)
    assert collector.resources[0]["service.name"] == "mine"


def test_what_the_caller_does_not_sample_is_not_recorded(collector: Collector) -> None:
    tracer = setup_tracer("braid", "x")
    tracer.record("decode", {"traceparent": CALLER["traceparent"][:-2] + "00"}, 1, 2)
    tracer.close(LIMIT_S)
    assert collector.spans == []


def test_without_a_collector_the_callers_headers_still_pass_through() -> None:
    tracer = Tracer()
    span = tracer.start("chat", CALLER)
    assert tracer.carrier(span) == CALLER
    assert tracer.carrier(tracer.start("chat", {})) == {}
    tracer.record("decode", CALLER, 1, 2)
    tracer.close()


def test_without_a_collector_the_sdk_is_not_even_imported() -> None:
    check = (
        "import sys; from braid.actors.tracing import setup_tracer; assert not setup_tracer('a', 'b').is_recording; "
        "assert not any(name.startswith('opentelemetry.sdk') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", check], check=True, env={})


def test_a_collector_that_does_not_answer_holds_nothing_up() -> None:
    answered, before = threading.Event(), set(threading.enumerate())

    def flush() -> None:
        assert answered.wait(LIMIT_S)

    Tracer(NoOpTracerProvider(), flush).close(timeout_s=0.1)
    [flusher] = set(threading.enumerate()) - before  # it waits still: we have not
    answered.set()
    flusher.join()


def test_a_protocol_we_do_not_speak_is_said(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert not setup_tracer("braid", "x").is_recording
    assert "Braid sends http/protobuf" in caplog.text
