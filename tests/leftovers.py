"""What a test's process has open: compared as sets, for what an earlier test has left may end at any time."""

from __future__ import annotations

import os
from contextlib import suppress


def open_fds() -> set[tuple[str, str]]:
    """The number of each, and what it is of."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found
