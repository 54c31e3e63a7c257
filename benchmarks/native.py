"""Native products beside torch's on the shapes of a small network: time, rates, share of what the machine can do.

    python benchmarks/native.py [--rows 1 8 32 128 512 2048] [--threads 1 2] [--out benchmarks/results/native.json]

Both take turns on the same inputs, each on matrices that left the caches since their last use; medians of `--rounds`.
The floor is the larger of the bytes at the read bandwidth and the multiplications at the matmul rate of this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from braid.kernels import native, reference

HIDDEN, EXPERTS, TOP_K, WIDTH = 1024, 64, 6, 192
MATRICES = {
    "qkv_a": (832, HIDDEN),
    "q_b": (1536, 256),
    "o": (HIDDEN, HIDDEN),
    "head": (4096, HIDDEN),
}  # outputs, inputs
COLD_BYTES = 96 << 20  # three times the last cache
PAUSE_S = 0.02  # until torch's threads sleep, which spin for some ms on the core that the others want

Thing = TypeVar("Thing")
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Machine:
    read_gb_s: float
    matmul_gflop_s: dict[str, float]  # by dtype, one thread


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    dtype: str
    threads: int
    rows: int
    native_us: float
    torch_us: float
    gflop_s: float
    gb_s: float
    floor_us: float


@dataclass(frozen=True, slots=True)
class Contest:
    """The same products by both; `num_bytes` and `num_products` are those of one call."""

    what: str
    rows: int
    native: Work
    torch: Work
    num_bytes: float
    num_products: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32, 128, 512, 2048])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    machine = measure_machine(args.dtypes)
    rows: list[Row] = []
    for dtype in args.dtypes:
        for contest in [*linear_contests(dtype, args.rows), *expert_contests(dtype, args.rows)]:
            rows += [measure(contest, dtype, threads, args.rounds, machine) for threads in args.threads]
    show(machine, rows)
    if args.out is not None:
        told = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(told, indent=1) + "\n")


def linear_contests(name: str, row_counts: list[int]) -> Iterator[Contest]:
    dtype: torch.dtype = getattr(torch, name)
    for what, (outputs, inputs) in MATRICES.items():
        copies = -(-COLD_BYTES // (outputs * inputs * dtype.itemsize))
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
        packed, plain = [native.pack(weight) for weight in weights], [reference.packed(weight) for weight in weights]
        del weights
        for num_rows in row_counts:
            x = torch.randn(num_rows, inputs).to(dtype)
            out = torch.empty(num_rows, outputs, dtype=dtype)
            num_bytes = (outputs * inputs + num_rows * (outputs + inputs)) * dtype.itemsize
            ours = in_turn(packed, partial(native.linear, x, out=out))
            theirs = in_turn(plain, partial(reference.linear, x))
            yield Contest(what, num_rows, ours, theirs, num_bytes, num_rows * outputs * inputs)


def expert_contests(name: str, row_counts: list[int]) -> Iterator[Contest]:
    """Uniform routing, drawn anew for each call, so that few rows find other experts than the call before."""
    dtype: torch.dtype = getattr(torch, name)
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).to(dtype) / 32
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH).to(dtype) / 16
    ours = native.pack_stack(w13, is_gate_up=True), native.pack_stack(w2)
    theirs = tuple(map(reference.packed, w13)), tuple(map(reference.packed, w2))
    for num_rows in row_counts:
        x, out = torch.randn(num_rows, HIDDEN).to(dtype), torch.empty(num_rows * TOP_K, HIDDEN, dtype=dtype)
        rows = torch.arange(num_rows).repeat_interleave(TOP_K)
        routings = [torch.rand(num_rows, EXPERTS).topk(TOP_K).indices.flatten() for _ in range(16)]
        touched = statistics.mean(len(set(routing.tolist())) for routing in routings)
        numbers = touched * 3 * WIDTH * HIDDEN + num_rows * (1 + TOP_K) * HIDDEN
        yield Contest(
            "experts",
            num_rows,
            in_turn(routings, partial(native.grouped_mlp, x, rows, w13=ours[0], w2=ours[1], out=out)),
            in_turn(routings, partial(reference.grouped_mlp, x, rows, w13=theirs[0], w2=theirs[1])),
            numbers * dtype.itemsize,
            num_rows * TOP_K * 3 * WIDTH * HIDDEN,
        )


def in_turn(things: list[Thing], work: Callable[[Thing], object]) -> Work:
    turn = cycle(things)
    return lambda: work(next(turn))


def measure(contest: Contest, dtype: str, threads: int, rounds: int, machine: Machine) -> Row:
    native.set_threads(threads)
    torch.set_num_threads(threads)
    calls = max(1, int(2e10 / (contest.num_products + 20 * contest.num_bytes)) // 10)  # some ms a turn
    times: dict[Work, list[float]] = {contest.native: [], contest.torch: []}
    for _ in range(rounds + 1):
        for work, taken in times.items():
            time.sleep(PAUSE_S)
            work()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            taken.append((time.perf_counter() - start) / calls)
    ours, theirs = (statistics.median(taken[1:]) for taken in times.values())
    compute_s = 2e-9 * contest.num_products / (threads * machine.matmul_gflop_s[dtype])
    floor_s = max(contest.num_bytes / machine.read_gb_s * 1e-9, compute_s)
    gflop_s, gb_s = 2e-9 * contest.num_products / ours, 1e-9 * contest.num_bytes / ours
    return Row(contest.what, dtype, threads, contest.rows, ours * 1e6, theirs * 1e6, gflop_s, gb_s, floor_s * 1e6)


def measure_machine(dtypes: list[str]) -> Machine:
    """Reading: the best of one and two threads, as memory is shared. Multiplying: torch on squares, one thread."""
    big = torch.ones(1 << 26)
    read_s = min(best(big.sum, threads) for threads in (1, 2))
    squares = {name: torch.ones(1024, 1024, dtype=getattr(torch, name)) for name in dtypes}
    rates = {name: 2 * 1024**3 / best(partial(torch.mm, square, square), 1) / 1e9 for name, square in squares.items()}
    return Machine(big.nbytes / read_s / 1e9, rates)


def best(work: Work, threads: int) -> float:
    torch.set_num_threads(threads)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def show(machine: Machine, rows: list[Row]) -> None:
    table = Table()
    for column in ("", "dtype", "threads", "rows", "native us", "torch us", "torch/native", "GFLOP/s", "GB/s", "floor"):
        table.add_column(column, justify="right")
    for row in rows:
        times = (f"{row.native_us:.0f}", f"{row.torch_us:.0f}", f"{row.torch_us / row.native_us:.2f}")
        rates = (f"{row.gflop_s:.0f}", f"{row.gb_s:.1f}", f"{row.floor_us / row.native_us:.0%}")
        table.add_row(row.what, row.dtype, str(row.threads), str(row.rows), *times, *rates)
    Console(width=110).print(table)
    told = ", ".join(f"{name} {rate:.0f}" for name, rate in machine.matmul_gflop_s.items())
    Console().print(f"read {machine.read_gb_s:.1f} GB/s; matmul GFLOP/s with one thread: {told}")


if __name__ == "__main__":
    main()
