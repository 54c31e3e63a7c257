"""Offers of shared memory: what becomes of those that nobody takes, and of deaths that another thread tells of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest
import torch

from braid.actors import mail_peers
from braid.actors.links import Hello, Link, LinkFull
from braid.actors.mail_peers import MailPeers
from braid.actors.mailbox import BoxShape, DevicePages
from braid.actors.messages import Kind
from braid.actors.reactor import Closed
from braid.router.expert_map import Owner, assign, build_map

CPU = torch.device("cpu")
NAMES = ["expert-0", "expert-1"]
MAP = build_map(1, 4, (1,), [Owner(name, 1) for name in NAMES], assign(4, NAMES, 2))


class Pages(DevicePages):
    """What torch would be told."""

    def __init__(self, made: list[Pages], problem: Exception | None = None) -> None:
        super().__init__(torch.empty(0, dtype=torch.uint8))
        self.let_go: list[str] = []
        self._problem = problem
        made.append(self)

    def tell(self) -> list[int]:
        if self._problem is not None:
            raise self._problem
        return [1]

    def close(self) -> None:
        self.let_go.append("closed")

    def disown(self) -> None:
        self.let_go.append("disowned")


class Wire:
    """A link as far as offers go."""

    def __init__(self, name: str, is_full: bool = False) -> None:
        self.peer = Hello(name, "expert", 1, "here")
        self.closed: str | None = None
        self.sent: list[int] = []
        self._is_full = is_full

    def send(self, kind: int, meta: bytes) -> None:
        if self._is_full:
            raise LinkFull("nobody reads")
        self.sent.append(kind)


@pytest.fixture(autouse=True)
def as_the_engine_runs() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Pages]:
    pages: list[Pages] = []
    monkeypatch.setattr(mail_peers, "make_pages", lambda num_bytes, device: Pages(pages))
    return pages


def peers_of(*wires: Wire) -> MailPeers:
    peers = MailPeers(MAP, BoxShape(4, 2, 32, 2), "here", CPU)
    peers.set_map(MAP, {wire.peer.name: cast(Link, wire) for wire in wires})
    return peers


def test_another_thread_tells_of_a_death(made: list[Pages]) -> None:
    dead, alive = (Wire(name) for name in NAMES)
    peers = peers_of(dead, alive)
    teller = threading.Thread(target=peers.bury, args=(cast(Link, dead),))
    teller.start()
    teller.join()
    assert peers.tables.gone[:3].tolist() == [1, 0, 0]


def test_an_offer_that_nobody_has_taken_costs_nothing_when_its_link_ends(made: list[Pages]) -> None:
    wire = Wire(NAMES[0])
    peers = peers_of(wire)
    assert wire.sent == [Kind.MAIL_OFFER]
    wire.closed = "it died"
    peers.hear(Closed(cast(Link, wire), "it died"))
    assert made[0].let_go == ["closed", "disowned"]


def test_an_offer_that_cannot_leave_costs_nothing(made: list[Pages]) -> None:
    peers = peers_of(Wire(NAMES[0], is_full=True))
    assert made[0].let_go == ["closed", "disowned"]
    assert peers.way == "staged"


@pytest.mark.parametrize("where", ["made", "told of"])
def test_memory_that_cannot_be_had_or_shared_leaves_rows_to_the_links(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problem, pages = RuntimeError("CUDA error: operation not supported"), list[Pages]()

    def make(num_bytes: int, device: torch.device) -> Pages:
        if where == "made":
            raise problem
        return Pages(pages, problem)

    monkeypatch.setattr(mail_peers, "make_pages", make)
    wire = Wire(NAMES[0])
    assert peers_of(wire).way == "staged"
    assert wire.sent == []
    assert [each.let_go for each in pages] == [["closed", "disowned"]] * (where == "told of")
    assert "no mailbox with expert-0: CUDA error" in caplog.text
