"""The tables of docs/kernels.md out of a result of the GPU script."""

import time

import torch

from braid.benchmarks.gpu import report
from braid.benchmarks.gpu.rivals import comparisons
from braid.benchmarks.gpu.setting import Setting
from braid.benchmarks.gpu.speed import cases

MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130", "triton": "3.6.0", "date": "2026-12-01"}
TIMES = {"us": 12.0, "least_us": 11.0, "most_us": 13.0}


def result(**sections: list[dict[str, object]]) -> dict[str, object]:
    return {"machine": MACHINE, "sections": {name: {"rows": rows} for name, rows in sections.items()}}


def cells(table: str, first: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_case_that_was_timed_has_its_figures_and_the_floor_of_what_was_drawn() -> None:
    setting = Setting(torch.device("meta"), "v3", time.monotonic())
    case = next(case for case in cases(setting) if case.kernel == "experts fp8" and case.rows == 32)
    row = {"name": case.name, "floor_us": 9.0, "gb_s": 3210.0, "tflop_s": 1.0, "share": 0.75, "passed": True} | TIMES
    page = report.speed(result(speed=[row], ceilings=[{"name": "copy GB/s", "value": 4300.0}]))
    assert "NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-12-01. 4,300 copy GB/s, 800 bf16 TFLOP/s" in page
    timed = next(line for line in page.splitlines() if "12 (11..13)" in line)
    assert "| 32 | 9 | 12 (11..13) | 3,210 | 1 | 75% | 75% of the bandwidth, met |" in timed


def test_every_proof_is_counted_and_told_by_name_where_it_failed() -> None:
    good: dict[str, object] = {"name": "a", "passed": True}
    bad: dict[str, object] = {"name": "b", "passed": False}
    lost: dict[str, object] = {"name": "c", "failed": "no|gpu"}
    page = report.proofs(result(checks=[good, good], network=[good, bad], mail=[good, {"name": "t", "us": 3.0}, lost]))
    assert cells(page, "checks") == ["checks", "2", "none"]
    assert cells(page, "network") == ["network", "1", "b: not passed"]
    assert cells(page, "mail") == ["mail", "1", "c: no/gpu"]
    assert cells(page, "sanitizer") == ["sanitizer", "0", "none"]


def test_rivals_and_layers_that_were_timed_are_told() -> None:
    rival, what, _ = next(comparisons(Setting(torch.device("meta"), "v3", time.monotonic())))
    row = {"name": f"{rival}: {what}", "us": 30.0, "ours_us": 12.0, "ratio": 2.5, "difference": 0.001}
    assert f"| {rival} | {what} | 30 | 12 | 2.50 | 0.1% |" in report.rivals(result(rivals=[row]))
    layer = {"name": "experts, 8 held, 4 tokens", "part": "experts", "tokens_per_s": 1e5} | TIMES
    page = report.layers(result(layers=[layer, {"name": "attention, batch 1", "failed": "out of memory"}]))
    assert cells(page, "experts") == ["experts", "8 held, 4 tokens", "12 (11..13)", "100,000"]
    assert "attention" not in page


def test_without_a_gpu_the_pages_say_so() -> None:
    assert report.proofs(None) == report.layers(None) == "No GPU has been at hand."
    assert report.speed(None).startswith("No GPU has been at hand")
