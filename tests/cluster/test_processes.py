"""Processes are known by pid and start time, and by the session they were born into."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from waiting import LIMIT_S

from braid.cluster.processes import Process, end_processes, is_alive, members, process_of, wait_gone

FAMILY = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "600"], start_new_session=False, process_group=0)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def leader() -> Iterator[tuple[subprocess.Popen[str], Process]]:
    """A session leader and its one child, in a process group of its own as Ray's workers are."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as p:
        assert p.stdout is not None
        yield p, process_of(int(p.stdout.readline()))
        p.kill()


def test_this_process_is_alive() -> None:
    assert is_alive(process_of(os.getpid()))


def test_a_pid_used_again_is_somebody_else() -> None:
    me = process_of(os.getpid())
    assert not is_alive(Process(me.pid, me.started - 1))
    assert members(Process(me.pid, me.started - 1)) == []


def test_nobody_has_no_start_time() -> None:
    with pytest.raises(ProcessLookupError, match="no process"):
        process_of(2**22 + 1)


def test_a_session_outlives_its_leader(leader: tuple[subprocess.Popen[str], Process]) -> None:
    popen, child = leader
    first = process_of(popen.pid)
    assert set(members(first)) == {first, child}
    popen.kill()
    popen.wait()
    assert members(first) == [child]
    assert end_processes(members(first), grace_s=LIMIT_S) == []
    assert wait_gone([child], 0.0) == []
    assert members(first) == []


def test_what_ignores_sigterm_is_killed() -> None:
    code = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        stubborn = process_of(popen.pid)
        assert end_processes([stubborn], grace_s=0.1) == [stubborn]
        assert not is_alive(stubborn)
