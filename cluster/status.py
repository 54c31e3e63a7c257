"""`braid status`: asks the supervisor over its Unix socket, or the controller on an existing Ray."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from .errors import ClusterStuck
from .registry import Record, Registry

TIMEOUT_S = 15.0


def status(name: str, registry: Registry) -> dict[str, Any]:
    """Raises ClusterNotFound and ClusterStuck."""
    record = registry.get(name)
    if record.is_alive():
        return _ask(record)
    if record.ray_address is not None:
        return status_on_ray(name, record.ray_address)
    raise ClusterStuck(f"cluster {name!r} died without cleaning up: `braid down --name {name}` sweeps up after it")


def status_on_ray(name: str, address: str) -> dict[str, Any]:
    from . import local_ray
    from .launch import find_controller
    from .supervisor import call

    local_ray.connect(address)
    try:
        answer: dict[str, Any] = asyncio.run(call(find_controller(name).status.remote(), TIMEOUT_S))
        return answer
    finally:
        local_ray.stop_ray()


def _ask(record: Record) -> dict[str, Any]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(TIMEOUT_S)
            line.connect(str(record.control_path))
            parts = iter(lambda: line.recv(1 << 16), b"")
            told = b"".join(parts)
            if not told:
                raise ClusterStuck(
                    f"cluster {record.name!r} has lost its controller: `braid down --name {record.name}` ends it "
                    f"(log: {record.log_file})"
                )
            answer: dict[str, Any] = json.loads(told)
            return answer
    except (OSError, ValueError) as error:
        raise ClusterStuck(f"cluster {record.name!r} does not answer: {error} (log: {record.log_file})") from None
