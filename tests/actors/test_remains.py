"""Memory that a process had open is freed when it has ended, and not before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from leftovers import open_fds

from braid.actors.mailbox import DevicePages
from braid.actors.remains import Remains


class Pages(DevicePages):
    """What torch would be told."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0, dtype=torch.uint8))
        self.is_disowned = False

    def disown(self) -> None:
        assert not self.is_disowned
        self.is_disowned = True


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def ended(process: subprocess.Popen[bytes]) -> None:
    """Ended, and not yet waited for: its number is still its own."""
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_it_is_kept_while_the_process_lives(process: subprocess.Popen[bytes]) -> None:
    before = open_fds()
    remains, first, second = Remains(), Pages(), Pages()
    remains.keep(process.pid, first)
    remains.keep(process.pid, second)
    assert len(open_fds() - before) == 1
    remains.free()
    assert not first.is_disowned
    ended(process)
    remains.free()
    assert first.is_disowned
    assert second.is_disowned
    remains.free()
    assert not open_fds() - before


def test_a_process_that_has_ended_keeps_nothing(process: subprocess.Popen[bytes]) -> None:
    remains, early, late = Remains(), Pages(), Pages()
    ended(process)
    remains.keep(process.pid, early)
    process.wait()
    remains.keep(process.pid, late)
    assert early.is_disowned
    assert late.is_disowned


def test_a_process_that_cannot_be_watched_costs_memory_and_no_error() -> None:
    remains, pages = Remains(), Pages()
    remains.keep(-1, pages)
    remains.free()
    assert not pages.is_disowned


def test_nothing_is_left_behind(process: subprocess.Popen[bytes]) -> None:
    before = open_fds()
    remains, pages = Remains(), Pages()
    remains.keep(process.pid, pages)
    remains.close()
    remains.close()
    assert not open_fds() - before
    assert not pages.is_disowned
