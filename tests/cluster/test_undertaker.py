"""A session whose leader is killed is gone soon after, its stubborn members too."""

from __future__ import annotations

import subprocess
import sys

import pytest
from waiting import LIMIT_S

from braid.cluster.processes import members, process_of, wait_gone

LEADER = """
import subprocess, sys
from braid.cluster.undertaker import hire
undertaker = hire()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, process_group=0)
child.stdout.readline()
print(undertaker.pid, child.pid, flush=True)
sys.stdin.read()
child.kill()
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_nothing_outlives_the_leader_for_long(is_killed: bool) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", LEADER], stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as popen:
        assert popen.stdout is not None
        session = {process_of(int(pid)) for pid in popen.stdout.readline().split()}
        leader = process_of(popen.pid)
        assert set(members(leader)) == {leader, *session}
        if is_killed:
            popen.kill()
        else:
            popen.communicate("")
    assert wait_gone(session, LIMIT_S) == []
    assert members(leader) == []
