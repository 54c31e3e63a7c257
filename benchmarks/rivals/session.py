"""What every engine's driver shares: answers its caller line by line, and tells when each token came.

A driver is a process of its own, in its engine's own environment, so this file needs the standard library only.
One JSON line in is one job, {"prompts": [[token id, ...], ...], "new_tokens": n}; one JSON line out is its answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Answers:
    """Per prompt: its generated tokens, and when each of them was there, in seconds since the job began."""

    token_ids: list[list[int]]
    times_s: list[list[float]]


class Engine(Protocol):
    """Greedy, no stop at end-of-sequence. `version` is what the report says it measured."""

    version: str

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> Answers: ...

    def close(self) -> None: ...


WARM_UP = [[3 + (7 * i + 11 * k) % 1000 for i in range(128)] for k in range(2)]


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began


def take_stdout() -> int:
    """What libraries print goes to stderr from now on; returns a descriptor of the real standard output."""
    real = os.dup(1)
    os.dup2(2, 1)
    return real


def serve(engine: Engine, out: int) -> None:
    """Answers jobs until standard input ends. The first line out says that the engine has answered its warm-up."""
    try:
        engine.generate(WARM_UP, 4)
        _say(out, {"version": engine.version})
        for line in sys.stdin:
            job = json.loads(line)
            _say(out, asdict(engine.generate(job["prompts"], job["new_tokens"])))
    finally:
        engine.close()


def _say(out: int, body: object) -> None:
    data = json.dumps(body).encode() + b"\n"
    while data:
        data = data[os.write(out, data) :]
