"""`braid down`: an orderly end with a deadline, then an end, and a look whether anything is left."""

from __future__ import annotations

import asyncio
import signal
import time

from .errors import ClusterStuck
from .processes import send, wait_gone
from .registry import Record, Registry

ORDERLY_S = 45.0
SPAWN_S = 10.0


def down(name: str, registry: Registry) -> list[int]:
    """Takes the cluster down and returns the pids that had to be killed. Raises ClusterNotFound and ClusterStuck."""
    record = _spawned(registry.get(name), registry)
    if record.supervisor is not None and send(record.supervisor, signal.SIGTERM):
        wait_gone([record.supervisor], ORDERLY_S)
    elif record.ray_address is not None:
        down_on_ray(name, record.ray_address)
    # Ray's own processes follow their parent within a second or two
    wait_gone(record.processes(), 5.0)
    killed = [process.pid for process in record.end(grace_s=1.0)]
    if left := record.processes():
        raise ClusterStuck(f"still running after SIGKILL: pids {', '.join(str(process.pid) for process in left)}")
    registry.remove(record)
    return killed


def _spawned(record: Record, registry: Registry) -> Record:
    """An `up` that has just taken the name knows its supervisor a moment later."""
    deadline = time.monotonic() + SPAWN_S
    while record.supervisor is None and record.is_alive():
        if time.monotonic() > deadline:
            raise ClusterStuck(f"cluster {record.name!r} is being started by pid {record.owner.pid}: stop that first")
        time.sleep(0.05)
        record = registry.get(record.name)
    return record


def down_on_ray(name: str, address: str) -> None:
    """Asks the controller on an existing Ray, wherever it was started from."""
    from . import local_ray
    from .launch import find_controller
    from .supervisor import call

    local_ray.connect(address)
    try:
        asyncio.run(call(find_controller(name).down.remote("asked by braid down"), ORDERLY_S))
    finally:
        local_ray.stop_ray()
