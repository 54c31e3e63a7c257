"""Writes the tables of docs/kernels.md from the JSON of the compile gate and of the GPU script.

python -m braid.benchmarks.gpu.report     from compile.json and, where there is one, gpu.json in benchmarks/results
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from braid.benchmarks.report import put_between, table

from .cases import Case
from .compile_table import COLUMNS, lines
from .rivals import comparisons
from .setting import Setting
from .shares import ceilings_of, floors_us
from .speed import cases

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "kernels.md", ROOT / "benchmarks" / "results"
# What an H100 gave programs of torch's elsewhere; floors are told by these until a run measures its own.
NOMINAL = {"copy GB/s": 3000.0, "bf16 TFLOP/s": 800.0, "fp8 TFLOP/s": 1600.0}
NO_GPU = "No GPU has been at hand: the cells are empty, and floors are those of 3.0 TB/s, 800 and 1,600 TFLOP/s."
Result = Mapping[str, Any]


def main() -> None:
    measured = RESULTS / "gpu.json"
    result = json.loads(measured.read_text()) if measured.exists() else None
    page = put_between(PAGE.read_text(), "compiled", compiled(json.loads((RESULTS / "compile.json").read_text())))
    for mark, write in (("speed", speed), ("rivals", rivals), ("proofs", proofs), ("layers", layers)):
        page = put_between(page, mark, write(result))
    PAGE.write_text(page)


def compiled(result: Result) -> str:
    rows = [["kernel", "tile", *COLUMNS, "verdict"]]
    for kernel, tile, cells, is_refused in lines(result):
        rows.append([f"`{kernel}`", tile, *cells, "refused" if is_refused else "ok"])
    told = f"Triton {result['triton']}, {result['target']}; of the several launches of a tile the largest figures."
    return f"{told}\n\n{table(rows)}"


def speed(result: Result | None) -> str:
    """Floors, and beside them what was measured, if anything was."""
    seen = {row["name"]: row for row in _rows(result, "speed")}
    ceilings = NOMINAL | ceilings_of(_rows(result, "ceilings"))
    rows = [["kernel", "shape", "rows", "floor us", "us (least..most)", "GB/s", "TFLOP/s", "share", "target"]]
    for case in cases(_v3()):
        work = {"bytes": case.work.num_bytes, "flop": case.work.flop, "rate": case.work.rate}
        floors = floors_us(work, ceilings)
        assert floors is not None, "NOMINAL has every ceiling"
        row = seen.get(case.name, {})
        floor = row.get("floor_us", max(floors))  # of what was drawn, where chance has a part in the work
        rows.append([case.kernel, case.shape, str(case.rows), _us(floor), *_measured(row), _target(case, row)])
    ceiling = ", ".join(f"{value:,.0f} {name}" for name, value in ceilings.items())
    return (
        f"{_machine(result)}\n\n{table(rows)}" if result is None else f"{_machine(result)} {ceiling}.\n\n{table(rows)}"
    )


def rivals(result: Result | None) -> str:
    seen = {row["name"]: row for row in _rows(result, "rivals")}
    rows = [["rival", "work", "its us", "our us", "its time / ours", "difference"]]
    for rival, what, _ in comparisons(_v3()):
        row = seen.get(f"{rival}: {what}", {})
        figures = [""] * 4
        if "us" in row:
            figures = [_us(row["us"]), _us(row["ours_us"]), f"{row['ratio']:.2f}", f"{row['difference']:.1%}"]
        rows.append([rival, what, *figures])
    return table(rows)


def proofs(result: Result | None) -> str:
    """How many rows passed, and by name those that did not."""
    if result is None:
        return NO_GPU.partition(":")[0] + "."
    rows = [["section", "passed", "failed"]]
    for name in ("checks", "invariance", "network", "sanitizer", "mail"):
        every = [row for row in _rows(result, name) if "passed" in row or "failed" in row]
        bad = [f"{row['name']}: {row.get('failed', 'not passed')}" for row in every if not row.get("passed")]
        rows.append([name, str(len(every) - len(bad)), "; ".join(bad).replace("|", "/") or "none"])
    return table(rows)


def layers(result: Result | None) -> str:
    rows = [["layer of", "sizes", "us (least..most)", "tokens/s"]]
    for row in _rows(result, "layers"):
        if "us" in row:
            sizes = row["name"].partition(", ")[2]
            rows.append([row["part"], sizes, _spread(row), f"{row['tokens_per_s']:,.0f}"])
    return table(rows) if len(rows) > 1 else NO_GPU.partition(":")[0] + "."


def _v3() -> Setting:
    return Setting(torch.device("meta"), "v3", time.monotonic())


def _rows(result: Result | None, section: str) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = result["sections"].get(section, {}).get("rows", []) if result else []
    return rows


def _machine(result: Result | None) -> str:
    if result is None:
        return NO_GPU
    machine = result["machine"]
    return f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, {machine['date']}."


def _measured(row: Mapping[str, Any]) -> Iterator[str]:
    if "us" not in row:
        yield from ("", "", "", "")
        return
    yield _spread(row)
    for key, form in (("gb_s", "{:,.0f}"), ("tflop_s", "{:,.0f}"), ("share", "{:.0%}")):
        yield form.format(row[key]) if key in row else ""


def _spread(row: Mapping[str, Any]) -> str:
    return f"{_us(row['us'])} ({_us(row['least_us'])}..{_us(row['most_us'])})"


def _target(case: Case, row: Mapping[str, Any]) -> str:
    if case.target is None:
        return ""
    least = case.target.least
    asked = f"{least:.0f} TFLOP/s" if case.target.of == "tflop_s" else f"{least:.0%} of the {case.target.of}"
    return asked + (f", {'met' if row['passed'] else 'missed'}" if "passed" in row else "")


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
