"""`braid generate` and `braid chat`: a client of our own gRPC interface, streaming to the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from rich.console import Console

from . import braid_v1_pb2 as pb
from . import braid_v1_pb2_grpc as services
from .errors import AnswerRefused

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Line:
    """Where to call, and with which key."""

    target: str
    api_key: str | None = None
    timeout_s: float = TIMEOUT_S

    def metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.api_key}")] if self.api_key else []


@dataclass(slots=True)
class Conversation:
    """The messages so far: the model sees all of them each time."""

    messages: list[Mapping[str, str]] = field(default_factory=list)

    def request(self, text: str, sampling: pb.Sampling) -> pb.GenerateRequest:
        self.messages.append({"role": "user", "content": text})
        return pb.GenerateRequest(messages=wire_messages(self.messages), sampling=sampling)


def wire_messages(messages: Sequence[Mapping[str, str]]) -> pb.Messages:
    return pb.Messages(messages=[pb.Message(role=m["role"], content=m["content"]) for m in messages])


def stream(line: Line, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    """Raises AnswerRefused with the server's own words."""
    with grpc.insecure_channel(line.target) as channel:
        stub = services.BraidStub(channel)
        call = stub.Generate(request, timeout=line.timeout_s, metadata=line.metadata())
        try:
            yield from call
        except grpc.RpcError as error:
            raise AnswerRefused(_refusal(line, error)) from None
        finally:
            call.cancel()


def generate(line: Line, prompt: str, sampling: pb.Sampling, console: Console) -> str:
    """Streams one completion to the console and returns its text."""
    return _show(stream(line, pb.GenerateRequest(text=prompt, sampling=sampling)), console)


def chat(line: Line, sampling: pb.Sampling, console: Console) -> None:
    """Reads turns until end of file or `/quit`; Ctrl-C cuts an answer short."""
    talk = Conversation()
    console.print("Type a message; /quit or Ctrl-D ends.", style="dim")
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if not text:
            continue
        _turn(line, talk, text, sampling, console)


def _turn(line: Line, talk: Conversation, text: str, sampling: pb.Sampling, console: Console) -> None:
    """A turn that was refused or cut short is as if it had not been: the next one starts from what was complete."""
    before = len(talk.messages)
    try:
        answer = _show(stream(line, talk.request(text, sampling)), console)
        talk.messages.append({"role": "assistant", "content": answer})
    except KeyboardInterrupt:
        console.print("\n(cut short)", style="dim")
        del talk.messages[before:]
    except AnswerRefused as error:
        console.print(str(error), style="red", markup=False)
        del talk.messages[before:]


def _show(responses: Iterator[pb.GenerateResponse], console: Console) -> str:
    parts: list[str] = []
    for response in responses:
        parts.append(response.text)
        console.out(response.text, end="", highlight=False)
        console.file.flush()
    console.out("")
    return "".join(parts)


def _refusal(line: Line, error: Any) -> str:
    if error.code() == grpc.StatusCode.UNAVAILABLE and "failed to connect" in (error.details() or ""):
        return f"nothing answers at {line.target}: is the cluster up? (`braid status`)"
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return f"{line.target} wants an API key that it knows: give its file with --api-key-file"
    return f"{error.code().name}: {error.details()}"
