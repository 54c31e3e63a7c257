"""The GPU script at tiny shapes in Triton's interpreter, end to end; and its arithmetic by hand."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import triton_interpreter
from waiting import until

triton_interpreter.repair()

from braid.benchmarks.gpu import __main__ as script  # noqa: E402
from braid.benchmarks.gpu import network, sanitizer  # noqa: E402
from braid.benchmarks.gpu.__main__ import SHARES, main  # noqa: E402
from braid.benchmarks.gpu.calibration_table import calibration  # noqa: E402
from braid.benchmarks.gpu.cases import Draw  # noqa: E402
from braid.benchmarks.gpu.cases_experts import chosen, grouped_case  # noqa: E402
from braid.benchmarks.gpu.checks import relative_error  # noqa: E402
from braid.benchmarks.gpu.process import run_ended  # noqa: E402
from braid.benchmarks.gpu.rival_kernels import extracted  # noqa: E402
from braid.benchmarks.gpu.setting import Row, Setting, each  # noqa: E402
from braid.benchmarks.gpu.shares import ceilings_of, judged  # noqa: E402
from braid.benchmarks.gpu.sizes import BUNDLED, TINY  # noqa: E402
from braid.model.torch_ops import TorchOps  # noqa: E402
from braid.router.calibration import Calibration  # noqa: E402

CEILINGS = {"copy GB/s": 3000.0, "bf16 TFLOP/s": 800.0, "fp8 TFLOP/s": 1600.0}


def test_every_section_runs_and_says_what_it_could_not_do(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--shapes", "tiny", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["sections"]) == list(SHARES)
    rows = {name: section["rows"] for name, section in result["sections"].items()}
    for name in ("ceilings", "checks", "invariance", "speed", "layers"):
        assert [row for row in rows[name] if "failed" in row] == []
    assert all(row["passed"] for row in rows["checks"] + rows["invariance"])
    assert {"floor_us", "share", "bound", "least_us", "most_us", "repeats"} <= set(rows["speed"][0])
    assert all("pass --rivals DIR" in row["failed"] for row in rows["rivals"])
    assert all("failed" in row for row in rows["sanitizer"])
    read = Calibration.from_path(tmp_path / "calibration.json")
    assert (read.gpu, read.model, read.experts[0].held, read.attention[0].context) == (None, "tiny", 2, 70)


def test_without_a_gpu_the_script_says_how_it_can_be_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "--device cpu --shapes tiny" in capsys.readouterr().err


def test_one_row_that_fails_takes_no_other_with_it_and_none_begins_after_the_end() -> None:
    def rows(setting: Setting) -> Iterator[Row]:
        def wrong() -> Row:
            raise RuntimeError("out of\n  memory")

        return each(setting, iter([("a", wrong), ("b", lambda: {"us": 1.0})]))

    cpu = torch.device("cpu")
    failed, good = rows(Setting(cpu, "tiny", time.monotonic() + 60))
    assert failed == {"name": "a", "failed": "RuntimeError: out of memory"}
    assert good == {"name": "b", "us": 1.0}
    assert all("not reached" in row["failed"] for row in rows(Setting(cpu, "tiny", time.monotonic() - 1)))


# A section without a GPU: its second row leaves the device unusable, its third one never ends.
SPOILED = """
import sys, time, torch
from braid.benchmarks.gpu import section
from braid.benchmarks.gpu.setting import each

is_spoiled = False

def spoil():
    global is_spoiled
    is_spoiled = True
    raise RuntimeError("an illegal memory access was encountered")

def synchronize():
    if is_spoiled:
        raise RuntimeError("it still was")

def rows(setting):
    good = lambda: {"passed": True}
    return each(setting, iter([("a", good), ("b", spoil), ("c", lambda: time.sleep(1000)), ("d", good)]))

torch.cuda.synchronize, torch.cuda.empty_cache = synchronize, lambda: None
section.SECTIONS["checks"] = rows
section.main(sys.argv[1:])
"""


def test_a_row_that_spoils_the_device_or_hangs_costs_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spoiled.py").write_text(SPOILED)
    monkeypatch.setattr(script, "SECTION", [sys.executable, "-P", str(tmp_path / "spoiled.py")])
    monkeypatch.setattr(script, "ROW_S", 1.0)
    args = argparse.Namespace(out=tmp_path, device="cuda", shapes="tiny", rivals=None)
    found = script.section("checks", args, 600)
    assert found["rows"] == [
        {"name": "a", "passed": True},
        {"name": "b", "failed": "RuntimeError: an illegal memory access was encountered"},
        {"name": "c", "failed": "it ended its process"},
        {"name": "d", "passed": True},
    ]
    assert "Timeout" in found["failed"]  # of the process that hung, with the place


def test_a_section_that_does_not_even_begin_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SECTION", [sys.executable, "-c", "raise SystemExit('no driver')"])
    found = script.section("speed", argparse.Namespace(out=tmp_path, device="cuda", shapes="v3", rivals=None), 600)
    assert (found["rows"], found["failed"]) == ([], "no driver\n")


def test_what_a_command_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is up when the inner process has said its name."""
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    names = []

    def communicate(process: subprocess.Popen[str], timeout: float) -> None:
        assert process.stdout is not None
        names.append(int(process.stdout.readline()))
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(subprocess.TimeoutExpired):
        run_ended([sys.executable, "-c", outer], 600)
    (pid,) = names
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, f"{pid}'s end")


def test_a_figure_that_json_has_no_word_for_is_a_failure() -> None:
    setting = Setting(torch.device("cpu"), "tiny", time.monotonic() + 60)
    (row,) = each(setting, iter([("a", lambda: {"error": float("inf"), "passed": False})]))
    assert row == {"name": "a", "failed": "ValueError: error: NaN or infinite"}


@pytest.mark.parametrize("last", [True, False, None])
def test_the_sanitizer_passes_only_with_checks_that_ran(
    last: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compute-sanitizer finds nothing in kernels that were not launched."""
    tool, rows = tmp_path / "compute-sanitizer", [{"name": "a", "passed": True}]
    rows += [{"name": "b", "passed": last} if last is not None else {"name": "b", "failed": "no such kernel"}]
    lines = "\n".join(map(json.dumps, rows))
    tool.write_text(f"#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\ncat > $1 <<END\n{lines}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    row = next(sanitizer.check(Setting(torch.device("cuda"), "v3", time.monotonic() + 60)))
    assert (row["passed"], row["bad"]) == (last is True, [] if last else ["b"])


def test_rows_that_come_together_are_set_beside_the_same_rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a GPU's kernels, asked of a CPU's: six rows of each of three sequences in three steps."""
    monkeypatch.setattr(network, "STEPS", 6)
    with torch.inference_mode():
        one_by_one = torch.stack(list(network.steps(network.network(torch.float32, TorchOps()), 3)), 1)
        together = network.in_groups(network.network(torch.float32, TorchOps()))
    assert together.shape == one_by_one.shape == (3, 7, BUNDLED.vocab_size)
    assert torch.equal(together, one_by_one)


def test_floors_shares_and_targets() -> None:
    assert ceilings_of([{"name": "copy GB/s", "value": 3000.0}, {"name": "bf16 TFLOP/s", "failed": "?"}]) == {
        "copy GB/s": 3000.0
    }
    row = {"us": 20.0, "bytes": 30e6, "flop": 1.6e9, "rate": "fp8", "target": {"of": "bandwidth", "least": 0.75}}
    told = judged(row, CEILINGS)
    assert told["floor_us"] == pytest.approx(10.0)  # 30 MB at 3 TB/s; the arithmetic alone takes 1 us
    assert (told["bound"], told["share"], told["passed"]) == ("memory", pytest.approx(0.5), False)
    assert judged(row | {"us": 12.0}, CEILINGS)["passed"]
    many = {"us": 100.0, "bytes": 3e6, "flop": 4e10, "rate": "bf16", "target": {"of": "tflop_s", "least": 350}}
    assert judged(many, CEILINGS)["reached"] == pytest.approx(400.0)
    assert judged(many, CEILINGS)["bound"] == "matrix"
    assert judged({"name": "x", "failed": "?"}, CEILINGS) == {"name": "x", "failed": "?"}


def test_experts_are_judged_by_the_work_that_was_drawn() -> None:
    """With few tokens chance decides how many experts are read at all."""
    draw, hidden, inner = Draw(torch.device("cpu")), TINY.hidden_size, TINY.moe_intermediate_size
    torch.manual_seed(5)
    work = grouped_case(TINY, 5, 3).bind(draw).work
    torch.manual_seed(5)
    mine = [expert for expert in chosen(draw, TINY, 5, 3).tolist() if expert >= 0]
    assert work is not None
    assert work.flop == len(mine) * 6 * hidden * inner
    assert work.num_bytes == len(set(mine)) * 3 * hidden * inner + len(mine) * (3 * hidden + 2 * inner)


def test_an_error_is_relative_for_numbers_and_a_count_for_integers() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]).double()) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1).double()) == float("inf")
    assert relative_error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


def test_a_calibration_keeps_what_was_measured() -> None:
    good = {"part": "experts", "held": 8, "tokens": 128, "us": 50.0, "tokens_per_s": 2.56e6, "least_us": 49.0}
    rows = [good, {"name": "experts, 32 held, 1 tokens", "failed": "out of memory"}]
    machine = {"gpu": "NVIDIA H100", "date": "2026-11-23"}
    table = calibration({"machine": machine, "shapes": "v3", "sections": {"layers": {"rows": rows}}})
    read = Calibration.from_dict(table)
    assert [(row.held, row.tokens, row.us) for row in read.experts] == [(8, 128, 50.0)]
    assert read.attention == ()


def test_a_rivals_kernels_are_taken_out_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "theirs.py"
    file.write_text("import not_installed\n\ndef wanted(x):\n    return x + 1\n\ndef other():\n    pass\n")
    assert extracted(file, ["wanted"]).wanted(1) == 2
    with pytest.raises(ValueError, match="has no gone"):
        extracted(file, ["gone"])
