"""Limits of a compiled kernel, broken one by one; and a compiler that really makes such kernels."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from braid.benchmarks.gpu.compile_table import lines
from braid.benchmarks.gpu.verdict import Asked, Measured, asked, broken_limits

GOOD = Measured(168, 0, 101_000, 12, {"HGMMA": 0, "QGMMA": 8, "HMMA": 0, "UTMALDG": 3})
FP8 = Asked(frozenset({"f8E4M3FN"}), True)

# A tile of 64 x 512 that 4 warps cannot hold, an fp8 product whose tokens lie on the side that asks for 64 rows, and a
# word that tells of rows with no barrier, and with one, between them.
BAD_KERNELS = """
import json, sys, torch, triton, triton.language as tl
from braid.benchmarks.gpu.launches import recorded
from braid.benchmarks.gpu.compile_gate import compile_one
from braid.kernels.gpu.mail import publish

@triton.jit
def spilling_kernel(x_ptr, y_ptr, out_ptr):
    row, column, depth = tl.arange(0, 64), tl.arange(0, 512), tl.arange(0, 64)
    total = tl.zeros((64, 512), tl.float32)
    for step in range(0, 8):
        x = tl.load(x_ptr + row[:, None] * 64 + depth[None, :] + step)
        y = tl.load(y_ptr + column[:, None] * 64 + depth[None, :] + step)
        total = tl.exp(tl.dot(x, y.T, total))
    tl.store(out_ptr + row[:, None] * 512 + column[None, :], total)

@triton.jit
def narrow_kernel(x_ptr, y_ptr, out_ptr):
    row, column, depth = tl.arange(0, 16), tl.arange(0, 128), tl.arange(0, 128)
    x = tl.load(x_ptr + row[:, None] * 128 + depth[None, :])
    y = tl.load(y_ptr + column[:, None] * 128 + depth[None, :])
    tl.store(out_ptr + row[:, None] * 128 + column[None, :], tl.dot(x, y.T))

@triton.jit
def telling_kernel(rows_ptr, bell, WAITS: tl.constexpr):
    column = tl.arange(0, 1024)
    tl.store(rows_ptr + column, column)
    if WAITS:
        tl.debug_barrier()
    publish(bell, 7, True)

def launch():
    wide, codes = torch.empty(1 << 16, dtype=torch.bfloat16, device="meta"), torch.float8_e4m3fn
    spilling_kernel[(1,)](wide, wide, wide.float(), num_warps=4)
    narrow_kernel[(1,)](wide.to(codes), wide.to(codes), wide.float(), num_warps=4)
    telling_kernel[(1,)](wide.int(), 1 << 40, False, num_warps=4)
    telling_kernel[(1,)](wide.int(), 1 << 40, True, num_warps=4)

for launch in recorded(launch):
    print(json.dumps(compile_one(launch, "a test").broken))
"""


def test_a_good_kernel_breaks_nothing() -> None:
    assert broken_limits(GOOD, FP8) == []


def test_each_limit_is_told_with_its_number_and_a_remedy() -> None:
    assert "spills 72 bytes" in broken_limits(replace(GOOD, spill_bytes=72), FP8)[0]
    assert "232449 bytes of shared memory" in broken_limits(replace(GOOD, shared_bytes=232_449), FP8)[0]
    assert broken_limits(replace(GOOD, shared_bytes=232_448), FP8) == []
    assert "65920 registers of 65536" in broken_limits(replace(GOOD, registers=103, warps=20), FP8)[0]


def test_instructions_must_be_those_of_warp_groups() -> None:
    slow = replace(GOOD, instructions={"HGMMA": 0, "QGMMA": 0, "HMMA": 64, "UTMALDG": 0})
    assert broken_limits(slow, FP8)[:2] == ["has no QGMMA", "has no UTMALDG"]
    assert "HMMA" in broken_limits(slow, FP8)[2]
    assert broken_limits(slow, Asked(frozenset({"f32"}), False)) == []  # fp32 has no tensor core product


def test_what_is_asked_for_is_read_from_tritons_own_form() -> None:
    ttir = (
        "%35 = tt.dot %w, %34, %cst, inputPrecision = tf32 {maxNumImpreciseAcc = 1073741824 : i32} : "
        "tensor<128x128xf8E4M3FN> * tensor<128x16xf8E4M3FN> -> tensor<128x16xf32>\n"
        "%9 = tt.descriptor_load %8[%0, %1] : !tt.tensordesc<tensor<128x128xf8E4M3FN>> -> tensor<128x128xf8E4M3FN>"
    )
    assert asked(ttir) == FP8
    assert asked("%1 = tt.load %0") == Asked(frozenset(), False)


def test_lines_of_the_table_take_the_worst_of_several_launches() -> None:
    def launch(registers: int, broken: tuple[str, ...]) -> dict[str, object]:
        measured = asdict(replace(GOOD, registers=registers))
        return {"kernel": "gemm.k", "tile": "T=16", "num_stages": 3, "measured": measured, "broken": broken}

    (kernel, tile, cells, is_refused), *others = lines({"kernels": [launch(54, ()), launch(90, ("spills",))]})
    assert (kernel, tile, is_refused, others) == ("gemm.k", "T=16", True, [])
    assert cells == ["2", "12", "3", "90", "0", "101000", "0", "8", "0", "3"]


def test_kernels_that_spill_multiply_fp8_by_hmma_or_tell_of_rows_too_early_are_refused(tmp_path: Path) -> None:
    """In a process of its own: one that interprets kernels cannot compile them."""
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD_KERNELS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-P", str(script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spilling, narrow, hasty, patient = [json.loads(line) for line in done.stdout.splitlines()]
    assert any("spills" in reason for reason in spilling)
    assert any("HMMA" in reason for reason in narrow)
    assert any("barrier" in reason for reason in hasty)
    assert patient == []
