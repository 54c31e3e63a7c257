"""Runs a command with a time limit that holds for all that it has started, too."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence


def run_ended(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """What it said and its exit status. subprocess.TimeoutExpired: its whole process group has been killed then."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
