"""Compiles every kernel of kernels/gpu for Hopper, without a GPU, and refuses what breaks its limits.

    python -m braid.benchmarks.gpu.compile_gate [--out FILE] [--report-only]

Nothing else may have imported Triton's interpreter in the same process. Under another Triton, named by PYTHONPATH, it
reports what that one makes of the kernels; `--report-only` then keeps the exit status 0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table

import braid.kernels.gpu

from .compile_table import COLUMNS, lines
from .compiled import launches
from .launches import Launch, launched_kernels
from .machine_code import measured
from .verdict import Measured, asked, broken_limits, told_too_early


@dataclass(frozen=True, slots=True)
class Compiled:
    """One launch and what became of it; `measured` is None where it did not compile."""

    kernel: str
    tile: str
    num_stages: int
    shape: str
    measured: Measured | None
    seconds: float
    broken: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON of the table")
    parser.add_argument("--report-only", action="store_true", help="tell, but do not refuse")
    args = parser.parse_args()
    begun = time.monotonic()
    found, failed = launches()
    compiled = compile_all(found)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(compiled))
    if args.out:
        args.out.write_text(json.dumps(as_json(compiled), indent=1) + "\n")
    broken = [each for each in compiled if each.broken]
    for each in broken:
        console.print(f"[red]{each.kernel}[/red] ({each.tile}; {each.shape}): {'; '.join(each.broken)}")
    failed += [f"{name} is launched by no case; add one to benchmarks/gpu/compiled.py" for name in forgotten(found)]
    for why in failed:
        console.print(f"[red]not compiled[/red]: {why}")
    found_out = f"{len(broken)} break a limit" if broken else "all within limits"
    seconds = time.monotonic() - begun
    console.print(f"{len(compiled)} launches compiled by Triton {triton.__version__} in {seconds:.0f} s: {found_out}")
    return 0 if args.report_only else int(bool(broken or failed))


def compile_all(found: Mapping[Launch, str]) -> list[Compiled]:
    """In as many processes as there are cores; sorted by kernel, then tile."""
    workers = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    with workers:
        compiled = list(workers.map(compile_one, found, found.values()))
    return sorted(compiled, key=lambda each: (each.kernel, each.tile, each.shape))


def compile_one(launch: Launch, shape: str) -> Compiled:
    begun = time.monotonic()
    name, tile = f"{launch.module.rpartition('.')[2]}.{launch.kernel}", _tile(launch.constants)
    stages = launch.options["num_stages"]
    try:
        kernel = launch.compiled()
    except Exception as error:  # the compiler's own, of any kind: one more reason to refuse the kernel
        why = (f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-300:]}",)
        return Compiled(name, tile, stages, shape, None, time.monotonic() - begun, why)
    wants = asked(kernel.asm["ttir"])
    seen = measured(kernel, wants.has_tensor_code)
    broken = (*broken_limits(seen, wants), *told_too_early(kernel.asm["ptx"]))
    return Compiled(name, tile, stages, shape, seen, time.monotonic() - begun, broken)


def forgotten(found: Iterable[Launch]) -> list[str]:
    covered = {(launch.module, launch.kernel) for launch in found}
    return [f"{module}.{name}" for module, name in launched_kernels(braid.kernels.gpu) if (module, name) not in covered]


def table(compiled: Sequence[Compiled]) -> Table:
    """For a terminal: one line a kernel and tile, of its several launches the largest figures."""
    shown = Table("kernel", "tile", title=f"Triton {triton.__version__}, sm_90a", title_justify="left")
    for title in COLUMNS:
        shown.add_column(title, justify="right")
    shown.add_column("verdict")
    for kernel, tile, cells, is_refused in lines(as_json(compiled)):
        shown.add_row(kernel, tile, *cells, "[red]refused[/red]" if is_refused else "ok")
    return shown


def as_json(compiled: Sequence[Compiled]) -> dict[str, Any]:
    return {"triton": triton.__version__, "target": "sm_90a", "kernels": [asdict(each) for each in compiled]}


def _tile(constants: Mapping[str, Any]) -> str:
    """The compile-time constants but those that are off; arguments that Triton turned into constants are lower case."""
    told = [(name, value) for name, value in constants.items() if len(name) > 1 and name.isupper()]
    return " ".join(name if value is True else f"{name}={value}" for name, value in told if value is not False)


if __name__ == "__main__":
    sys.exit(main())
