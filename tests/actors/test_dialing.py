"""The choice of a transport, and what makes two processes neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal

import pytest

from braid.actors.dialing import choose_transport, host_id
from braid.actors.links import Hello

ME = Hello("me", "both", 1, "here")


@pytest.mark.parametrize(
    ("theirs", "setting", "bulk", "chosen"),
    [
        ("here", "auto", True, "shm"),
        ("here", "auto", False, "unix"),
        ("there", "auto", True, "tcp"),
        ("there", "auto", False, "tcp"),
        ("here", "shm", True, "shm"),
        ("here", "tcp", True, "tcp"),
        ("there", "tcp", False, "tcp"),
    ],
)
def test_choice(theirs: str, setting: Literal["auto", "shm", "tcp"], bulk: bool, chosen: str) -> None:
    assert choose_transport(ME, theirs, setting, bulk) == chosen


def test_shared_memory_across_hosts_is_bad_input() -> None:
    with pytest.raises(ValueError, match="the peer is on another host: use 'auto' or 'tcp'"):
        choose_transport(ME, "there", "shm", bulk=True)


def test_processes_of_one_machine_share_a_host_id() -> None:
    script = "from braid.actors.dialing import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    assert other == host_id()
    assert str(os.stat("/proc/self/ns/mnt").st_ino) in other
