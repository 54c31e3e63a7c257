"""What a GPU would be asked to compile: nothing new when another number of rows comes along in service."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Of each kernel and its compile-time constants, in each use of it: what else it was compiled for, by number of rows.
SCRIPT = """
import json
from collections import defaultdict
import torch
from braid.benchmarks.gpu import cases_attention, cases_experts, cases_products, cases_rows
from braid.benchmarks.gpu.cases import Draw
from braid.benchmarks.gpu.launches import recorded
from braid.benchmarks.gpu.sizes import V3
from braid.model.device_sampler import _launch
from braid.model.sampler import Ask
from braid.model.sampling_params import SamplingParams

META, PARAMS = torch.device("meta"), SamplingParams(max_tokens=1, temperature=0.5, top_k=5, top_p=0.9)
kinds = defaultdict(lambda: defaultdict(set))

def note(use, rows, work):
    for launch in recorded(work):
        constants = {name: value for name, value in launch.constants.items() if len(name) > 1 and name.isupper()}
        kinds[f"{use}: {launch.kernel} {constants}"][rows].add(launch.specialization)

for rows in (1, 2, 3, 5, 7, 13, 16):
    cases = [*cases_rows.cases(V3, rows), *cases_products.cases(V3, rows), *cases_attention.row_cases(V3, rows)]
    cases += cases_experts.cases(V3, rows, 8)
    for case in cases:
        note(case.name.replace(f"{rows} rows", ""), rows, lambda: case.bind(Draw(META)).actual())
    logits, asks = torch.empty(rows, V3.vocab_size, device=META), [Ask(row, PARAMS, 7) for row in range(rows)]
    note("sampling", rows, lambda: _launch(logits, asks))
print(json.dumps([name for name, of_rows in kinds.items() if len(set(map(frozenset, of_rows.values()))) > 1]))
print(json.dumps(sorted(kinds)))
"""


def test_a_kernel_is_compiled_once_whatever_the_number_of_rows(tmp_path: Path) -> None:
    """In a process of its own: one that interprets kernels launches none."""
    script = tmp_path / "launches.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", str(script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled_again, kinds = [json.loads(line) for line in done.stdout.splitlines()]
    assert compiled_again == []
    for kernel in ("logits_kernel", "w13_fp8_kernel", "index_kernel", "draw_kernel", "digit_kernel", "norm_kernel"):
        assert any(f" {kernel} " in kind for kind in kinds), kernel
