"""Engines as processes, with a driver written here: turns, failures, and that nothing is left running."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from braid.benchmarks.rivals import engine_process
from braid.benchmarks.rivals.engine_process import Command, EngineFailed, EngineProcess

DRIVER = """
import subprocess, sys, time
from braid.benchmarks.rivals.session import Answers, serve, take_stdout

class Echo:
    version = "echo 1"

    def generate(self, prompts, new_tokens):
        if prompts[0][0] == 99:
            raise RuntimeError("ninety-nine is too much")
        if prompts[0][0] == 98:
            new_tokens -= 1
        return Answers([[p[0]] * new_tokens for p in prompts], [[0.5] * new_tokens for _ in prompts])

    def close(self):
        pass

out = take_stdout()
print("a library says hello")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", __file__])
if "broken" in sys.argv:
    sys.exit("the weights are missing")
if "hangs" in sys.argv:
    time.sleep(600)
serve(Echo(), out)
if "leaves a child" not in sys.argv:
    child.kill()
    child.wait()
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Path]:
    """Whatever becomes of it, nothing that names it is left, its orphans neither."""
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    yield path
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(path) in (one.info["cmdline"] or ())]


def start(driver: Path, *arguments: str) -> EngineProcess:
    command = Command([sys.executable, str(driver), *arguments])
    return EngineProcess("echo", command, driver.with_suffix(".log"), driver.parent)


def states(engine: EngineProcess) -> set[str]:
    return {process.status() for process in engine.processes()}


def test_an_engine_answers_in_its_turn_and_is_frozen_otherwise(driver: Path) -> None:
    with start(driver) as engine:
        engine.wait_ready(60)
        assert engine.version == "echo 1"
        assert engine.start_s > 0
        assert states(engine) == {psutil.STATUS_STOPPED}
        with engine.awake():
            assert engine.run([[7], [8]], 2, 60).token_ids == [[7, 7], [8, 8]]
            assert psutil.STATUS_STOPPED not in states(engine)
        assert states(engine) == {psutil.STATUS_STOPPED}
        assert engine.peak_mib > 5
    assert engine.processes() == []


def test_what_an_engine_leaves_behind_is_ended(driver: Path) -> None:
    with start(driver, "leaves a child") as engine:
        engine.wait_ready(60)
        children = engine.processes()
    assert len(children) == 2
    assert engine.processes() == []


def test_an_engine_that_cannot_start_says_why(driver: Path) -> None:
    with start(driver, "broken") as engine:
        with pytest.raises(EngineFailed, match="the weights are missing"):
            engine.wait_ready(60)
        assert engine.processes() == []


def test_an_engine_that_is_not_ready_in_time_takes_no_core_from_the_others(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "STOP_S", 0.2)
    with start(driver, "hangs") as engine:
        with pytest.raises(EngineFailed, match="no answer within"):
            engine.wait_ready(0.2)
        assert engine.processes() == []


def test_an_engine_that_fails_at_a_job_says_why(driver: Path) -> None:
    with start(driver) as engine:
        engine.wait_ready(60)
        with engine.awake(), pytest.raises(EngineFailed, match="ninety-nine"):
            engine.run([[99]], 1, 60)
    assert engine.processes() == []


def test_an_answer_that_is_shorter_than_asked_is_no_answer(driver: Path) -> None:
    with start(driver) as engine:
        engine.wait_ready(60)
        with engine.awake(), pytest.raises(EngineFailed, match=r"asked for 3 tokens of 2 prompts, got \[2, 2\]"):
            engine.run([[98], [98]], 3, 60)


def test_an_engine_that_does_not_answer_is_given_up(driver: Path) -> None:
    with start(driver) as engine:
        engine.wait_ready(60)
        with pytest.raises(EngineFailed, match="no answer within"):
            engine.run([[1]], 1, 0.2)  # asleep
