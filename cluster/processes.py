"""Names processes safely (pid and start time) and ends them without ever going by their names."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KILLED_S = 30.0  # a process that was killed ends by itself, but on a busy machine not at once


@dataclass(frozen=True, slots=True)
class Process:
    """`started` is the kernel's start time in ticks since boot: a pid alone may by now be somebody else's."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    session: int
    started: int


def process_of(pid: int) -> Process:
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return Process(pid, stat.started)


def is_alive(process: Process) -> bool:
    stat = _stat(process.pid)
    return stat is not None and stat.state != "Z" and stat.started == process.started


def members(leader: Process) -> list[Process]:
    """Every living process of the session that `leader` started, whether or not the leader still lives.

    The kernel does not give a session's number away while it has members, so the number is enough once the leader is
    gone; a leader with another start time means that the session ended and its number was used again.
    """
    now = _stat(leader.pid)
    if now is not None and now.started != leader.started:
        return []
    found = []
    for path in Path("/proc").iterdir():
        stat = _stat(int(path.name)) if path.name.isdigit() else None
        if stat and stat.session == leader.pid and stat.state != "Z" and stat.started >= leader.started:
            found.append(Process(int(path.name), stat.started))
    return found


def end_processes(processes: Iterable[Process], grace_s: float) -> list[Process]:
    """SIGTERM, `grace_s` to go, SIGKILL. Returns those that had to be killed."""
    remaining = [process for process in processes if send(process, signal.SIGTERM)]
    remaining = wait_gone(remaining, grace_s)
    for process in remaining:
        send(process, signal.SIGKILL)
    wait_gone(remaining, KILLED_S)
    return remaining


def send(process: Process, number: signal.Signals) -> bool:
    if not is_alive(process):
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_gone(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Those still alive after at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    remaining = [process for process in processes if is_alive(process)]
    while remaining and time.monotonic() < deadline:
        time.sleep(0.05)
        remaining = [process for process in remaining if is_alive(process)]
    return remaining


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return _Stat(state=fields[0], session=int(fields[3]), started=int(fields[19]))
