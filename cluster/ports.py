"""Ports for servers that start later: free now, and none that the system would give to somebody else meanwhile."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

LOWEST, HIGHEST = 20_000, 65_535  # Ray's workers listen on ports of their own choice below 20,000


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1.

    Whoever binds port 0 or opens a connection gets a number of the system's range, and a cluster that starts does so a
    hundred times. A port of that range can be gone before it is wanted; one below it goes only to who asks for it.
    """
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            port = random.randrange(LOWEST, _highest())
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found


def _highest() -> int:
    begin = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return begin if begin > LOWEST else HIGHEST
