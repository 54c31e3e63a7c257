"""`generate` and `chat` against a real gRPC server whose answers are scripted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from rich.console import Console
from waiting import LIMIT_S

from braid.cluster import braid_v1_pb2 as pb
from braid.cluster import braid_v1_pb2_grpc as services
from braid.cluster.errors import AnswerRefused
from braid.cluster.talk import Line, chat, generate


class Scripted(services.BraidServicer):
    """Says `hello` in two pieces; refuses the text `no`."""

    def __init__(self) -> None:
        self.seen: list[pb.GenerateRequest] = []
        self.keys: list[str | None] = []

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.seen.append(request)
        self.keys.append(dict(context.invocation_metadata()).get("authorization"))
        last = request.messages.messages[-1].content if request.HasField("messages") else request.text
        if last == "no":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")
        yield pb.GenerateResponse(text="hel")
        yield pb.GenerateResponse(text="lo [b]", finish_reason=pb.FINISH_REASON_STOP)


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, Line]]:
    servicer, server = Scripted(), grpc.server(ThreadPoolExecutor(2))
    services.add_BraidServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, Line(f"127.0.0.1:{port}", "key-1", LIMIT_S)
    server.stop(0).wait()


def test_generate_streams_and_returns_the_text(scripted: tuple[Scripted, Line]) -> None:
    servicer, line = scripted
    out = io.StringIO()
    assert generate(line, "say", pb.Sampling(max_tokens=3), Console(file=out)) == "hello [b]"
    assert out.getvalue() == "hello [b]\n"
    assert servicer.seen[0].text == "say"
    assert servicer.seen[0].sampling.max_tokens == 3
    assert servicer.keys == ["Bearer key-1"]


def test_a_refusal_is_told_in_the_servers_words(scripted: tuple[Scripted, Line]) -> None:
    with pytest.raises(AnswerRefused, match=r"^RESOURCE_EXHAUSTED: busy$"):
        generate(scripted[1], "no", pb.Sampling(), Console(file=io.StringIO()))


def test_chat_remembers_what_was_complete(scripted: tuple[Scripted, Line], monkeypatch: pytest.MonkeyPatch) -> None:
    servicer, line = scripted
    out = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\nno\ntwo\n/quit\nthree\n"))
    chat(line, pb.Sampling(), Console(file=out))
    assert "RESOURCE_EXHAUSTED: busy" in out.getvalue()
    assert [[(m.role, m.content) for m in request.messages.messages] for request in servicer.seen] == [
        [("user", "one")],
        [("user", "one"), ("assistant", "hello [b]"), ("user", "no")],
        [("user", "one"), ("assistant", "hello [b]"), ("user", "two")],
    ]
