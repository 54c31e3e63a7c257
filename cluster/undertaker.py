"""Ends what a killed supervisor leaves behind: some of Ray's own processes would live on until the next `braid up`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from .processes import Process, members, process_of, send, wait_gone

LEAVE_S = 5.0  # what Ray's processes may take to notice by themselves that their cluster ended


def hire() -> subprocess.Popen[bytes]:
    """Starts one for the calling process, which leads a session. It goes when the session is gone."""
    leader = process_of(os.getpid())
    # Nobody inherits the other end of its stdin: end of file is our death, however we die.
    stdin, _ = os.pipe()
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "braid.cluster.undertaker", str(leader.pid), str(leader.started)], stdin=stdin
        )
    finally:
        os.close(stdin)


def bury(leader: Process) -> None:
    """Waits for the leader's death, then for the rest of its session, and kills what stays."""
    while os.read(0, 1):
        pass
    wait_gone(_others(leader), LEAVE_S)
    for process in _others(leader):
        send(process, signal.SIGKILL)


def _others(leader: Process) -> list[Process]:
    return [process for process in members(leader) if process.pid != os.getpid()]


if __name__ == "__main__":
    bury(Process(int(sys.argv[1]), int(sys.argv[2])))
