"""Waiting for what somebody else brings about, in tests of what runs in other threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_S = 400.0  # no promise of anything: it ends a test that waits in vain, and a busy machine may take long

Answer = TypeVar("Answer")


def until(found: Callable[[], Answer | None], what: str) -> Answer:
    """Asks until the answer is true, and returns it; an answer that cannot be had yet is not one."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        trouble: OSError | None = None
        try:
            if answer := found():
                return answer
        except OSError as error:
            trouble = error
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s in vain for {what}: {trouble or 'no trouble'}"
        time.sleep(0.1)
