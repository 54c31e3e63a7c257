"""The load generator as a process: what it says, that it is waited for in bounds, and that nothing of it is left."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from braid.benchmarks import load
from braid.tests.waiting import until

SUMMARY = {
    "request_throughput": {"avg": 2.0},
    "output_token_throughput": {"avg": 128.0},
    "time_to_first_token": {"p50": 10.0, "p90": 20.0, "p99": 30.0},
    "inter_token_latency": {"p50": 1.0, "p90": 2.0, "p99": 3.0},
    "request_count": {"avg": 60.0},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LOG", tmp_path / "aiperf.log")
    monkeypatch.setattr(load, "work_dir", lambda: tmp_path)


def test_a_row_has_a_cell_for_every_column() -> None:
    assert load.row_of(4.0, SUMMARY) == [4.0, 2.0, 128.0, 10.0, 20.0, 30.0, 1.0, 2.0, 3.0, 60, 0]
    assert len(load.row_of(4.0, SUMMARY)) == len(load.COLUMNS)
    assert load.row_of(4.0, {**SUMMARY, "error_request_count": {"avg": 3.0}})[-1] == 3


def test_its_exit_code_is_told_and_its_words_are_kept() -> None:
    assert load.run([sys.executable, "-c", "import sys; sys.exit('no such model')"], 60) == 1
    assert "no such model" in load.LOG.read_text()


def test_a_generator_that_hangs_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="did not end within"):
        load.run(["sh", "-c", "sleep 600 & echo $! > pid; wait"], 2)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: has_ended(pid), f"the end of {pid}")


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
