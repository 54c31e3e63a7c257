"""Everything that only a GPU can show, in one command: DIR/gpu.json, and DIR/calibration.json for planners.

    python -m braid.benchmarks.gpu --out DIR [--rivals DIR] [--only SECTION ..] [--minutes 9]

Sections: ceilings, checks, invariance, speed, layers, network, rivals, sanitizer, mail. On a GPU each has its share of
the time and a process of its own, and after a row whose kernel went wrong or hung another one, that goes on behind it.
`--device cpu --shapes tiny` goes the same way in this process, under Triton's interpreter if it is switched on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from .calibration_table import calibration
from .process import run_ended
from .section import main as run_here
from .setting import Row, rows_of
from .shares import ceilings_of, judged
from .sizes import MODELS

# Of the whole time; what a section leaves is its successors'.
SHARES = {
    "ceilings": 0.05, "checks": 0.17, "invariance": 0.08, "speed": 0.22, "layers": 0.12, "network": 0.12,
    "rivals": 0.11, "sanitizer": 0.07, "mail": 0.06,
}  # fmt: skip
GRACE_S = 10.0  # for the row that is at work when the time is up
ROW_S = 60.0  # of these sections no row takes that long, not even where kernels are still to be compiled
WATCHED = ("ceilings", "checks", "invariance", "speed", "layers")
SECTION = [sys.executable, "-P", "-m", "braid.benchmarks.gpu.section"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", choices=MODELS, default="v3")
    parser.add_argument("--rivals", type=Path, help="what docs/kernels.md says how to gather")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=9.0)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shapes tiny only tries the script itself")
    args.out.mkdir(parents=True, exist_ok=True)
    begun, used = time.monotonic(), 0.0
    result: dict[str, Any] = {"machine": machine(args.device), "shapes": args.shapes, "sections": {}}
    for name in [name for name in SHARES if name in args.only]:
        used += SHARES[name]
        seconds = max(begun + used * 60 * args.minutes - time.monotonic(), 1.0)
        Console(highlight=False).print(f"{name}: at most {seconds:.0f} s")
        result["sections"][name] = section(name, args, seconds)
        ceilings = ceilings_of(result["sections"].get("ceilings", {}).get("rows", []))
        if name == "speed":
            result["sections"][name]["rows"] = [judged(row, ceilings) for row in result["sections"][name]["rows"]]
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "calibration.json").write_text(json.dumps(calibration(result), indent=1) + "\n")
    Console().print(summary(result))
    return int(any(each["failed"] for each in result["sections"].values()))


def section(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """{"rows": .., "seconds": .., "failed": why a process of it ended too early, or None}."""
    file, begun = args.out / f"{name}.rows", time.monotonic()
    file.unlink(missing_ok=True)
    options = [name, "--rows", str(file), "--device", args.device, "--shapes", args.shapes]
    options += ["--rivals", str(args.rivals.absolute())] if args.rivals else []
    failed = None
    if args.device == "cuda":
        failed = in_processes(options + ["--row-seconds", str(ROW_S)] * (name in WATCHED), file, seconds)
    else:
        run_here([*options, "--seconds", str(seconds)])
    rows = rows_of(file)
    file.unlink(missing_ok=True)
    return {"rows": rows, "seconds": time.monotonic() - begun, "failed": failed}


def in_processes(options: Sequence[str], file: Path, seconds: float) -> str | None:
    """Why the last process that ended too early did; each is followed by one that goes on behind its last row."""
    rows, failed, stop_at = list[Row](), None, time.monotonic() + seconds
    while (left := stop_at - time.monotonic()) > 0:
        begun = len(rows)
        command = [*SECTION, *options, "--seconds", str(left), "--skip", str(begun)]
        try:
            done = run_ended(command, left + GRACE_S)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds + GRACE_S:.0f} s"
        if done.returncode == 0:
            break
        failed = done.stderr[-500:] or f"exit status {done.returncode}"
        rows = rows_of(file)
        if len(rows) == begun:
            break
    return failed


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "gpu": None, "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip
    if device == "cuda":
        seen = torch.cuda.get_device_properties(0)
        facts |= {"gpu": seen.name, "memory_gib": round(seen.total_memory / 2**30), "cuda": torch.version.cuda}
        facts |= {"multiprocessors": seen.multi_processor_count, "l2_mib": seen.L2_cache_size / 2**20}
    return facts


def summary(result: dict[str, Any]) -> Table:
    table = Table("section", "rows", "passed", "missed", "failed", "s")
    for name, each in result["sections"].items():
        rows = each["rows"]
        counts = [sum(row.get("passed") is kind for row in rows) for kind in (True, False)]
        lost = sum("failed" in row for row in rows)
        table.add_row(name, str(len(rows)), *map(str, counts), each["failed"] or str(lost), f"{each['seconds']:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
