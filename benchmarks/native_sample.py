"""Draws of a token by the native module beside their definition in numpy: `python benchmarks/native_sample.py`.

Both take turns on the same rows of logits; medians of `--rounds`. Every token is compared. The floor is one reading of
a row at the read bandwidth of this machine: filters and noise are arithmetic on top of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from braid.benchmarks.roofline import measure_machine
from braid.kernels.native_sample import draw
from braid.model.sampler import Logits
from braid.model.sampler import draw as defined
from braid.model.sampling_params import SamplingParams

VOCABULARIES = (4_096, 129_280)
ROWS = 16
SETTINGS = {
    "temperature 1": SamplingParams(1),
    "temperature 0.6, top_p 0.95": SamplingParams(1, temperature=0.6, top_p=0.95),
    "temperature 0.8, top_k 50, top_p 0.9": SamplingParams(1, temperature=0.8, top_k=50, top_p=0.9),
    "min_p 0.05": SamplingParams(1, min_p=0.05),
}


def natively(logits: Logits, best: int, params: SamplingParams, position: int) -> int | None:
    return draw(logits, best, params.temperature, params.min_p, params.top_k, params.top_p, params.seed, position)


def measure(rows: Logits, params: SamplingParams, rounds: int) -> list[float]:
    """Microseconds a draw, native and defined: medians."""
    best, times, tokens = rows.argmax(axis=1).tolist(), list[list[float]](), list[list[int | None]]()
    ways: tuple[Callable[[Logits, int, SamplingParams, int], int | None], ...] = (natively, defined)
    for _ in range(rounds + 1):
        taken = []
        for way in ways:
            start = time.perf_counter()
            tokens.append([way(row, best[place], params, place) for place, row in enumerate(rows)])
            taken.append(1e6 * (time.perf_counter() - start) / len(rows))
        times.append(taken)
    assert all(told == tokens[0] for told in tokens), "the definition draws another token"
    return [statistics.median(taken) for taken in zip(*times[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    bandwidth = 1e9 * measure_machine(torch.float32, torch.get_num_threads()).read_gb_s
    table = Table()
    for column in ("tokens", "", "native us", "numpy us", "numpy/native", "floor us"):
        table.add_column(column, justify="right")
    for vocab in VOCABULARIES:
        rows = (torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(0)) * 3).numpy()
        for what, params in SETTINGS.items():
            ours, theirs = measure(rows, params, args.rounds)
            floor_us = 1e6 * rows[0].nbytes / bandwidth
            table.add_row(f"{vocab:,}", what, f"{ours:.0f}", f"{theirs:.0f}", f"{theirs / ours:.1f}", f"{floor_us:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
