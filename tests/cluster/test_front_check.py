"""What is said of a front end that cannot serve."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from braid.cluster.controller_settings import ControllerSettings, ModelFacts
from braid.cluster.front_check import address, check_grpc, reachable
from braid.cluster.spec import ClusterSpec


class Actor:
    """Answers as Ray's handle of a front end's actor does: `actor.load.remote()`."""

    def __init__(self, load: dict[str, Any] | Exception) -> None:
        self._load = load
        self.load = self

    def remote(self) -> Awaitable[dict[str, Any]]:
        async def answer() -> dict[str, Any]:
            if isinstance(self._load, Exception):
                raise self._load
            return self._load

        return answer()


def checked(load: dict[str, Any] | Exception) -> dict[str, Any]:
    model = ModelFacts("", 0, (), 0, 0, "")
    return asyncio.run(check_grpc(Actor(load), ControllerSettings(ClusterSpec(), model, b"", (), "", is_local=True)))


def test_a_front_end_that_answers_is_not_said_to_be_silent() -> None:
    told = checked({"ready": False, "running": 0})
    assert not told["ready"]
    assert told["reason"] == "it is linked with no worker for prompts, or none to decode"
    assert checked({"ready": True, "running": 2}) == {"ready": True, "running": 2}


def test_a_front_end_that_is_gone_is() -> None:
    assert checked(OSError("gone")) == {"ready": False, "reason": "OSError: its process does not answer"}


def test_who_listens_everywhere_is_asked_on_loopback() -> None:
    assert [reachable(host) for host in ("0.0.0.0", "::", "10.1.2.3")] == ["127.0.0.1", "::1", "10.1.2.3"]


def test_an_address_can_be_used_as_it_is_shown() -> None:
    assert address("127.0.0.1", 9000) == "127.0.0.1:9000"
    assert address("::1", 9000) == "[::1]:9000"
