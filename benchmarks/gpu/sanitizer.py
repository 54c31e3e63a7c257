"""NVIDIA's compute-sanitizer over the checks at tiny shapes: reads outside of memory, races in shared memory."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from .process import run_ended
from .setting import Row, Setting, each, rows_of

TOOLS = ("memcheck", "racecheck")
FOUND_SOMETHING = 86  # the exit status that we ask for


def check(setting: Setting) -> Iterator[Row]:
    """Rows with `passed` and the tool's last words."""
    return each(setting, ((tool, partial(_under, tool, setting)) for tool in TOOLS))


def _under(tool: str, setting: Setting) -> Row:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        raise FileNotFoundError("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    if setting.device.type != "cuda":
        raise ValueError(f"compute-sanitizer watches a GPU, not {setting.device}; run with --device cuda")
    with TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING), "--print-limit", "5"]
        command += ["--target-processes", "all"]  # not only `env`
        # without the caching allocator, what lies past a tensor belongs to nobody
        python = [sys.executable, "-P", "-m", "braid.benchmarks.gpu.section", "checks", "--shapes", "tiny"]
        command += ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *python, "--rows", str(rows)]
        done = run_ended(command, max(setting.stop_at - time.monotonic(), 1.0))
        every = rows_of(rows)
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    bad = [row["name"] for row in every if not row.get("passed")]  # of what did not run nothing can be found
    told = {"exit": done.returncode, "said": said[-3:] or done.stderr[-300:], "rows": len(every), "bad": bad}
    return {"passed": done.returncode == 0 and bool(every) and not bad} | told
