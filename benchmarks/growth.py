"""What size costs: concurrency, context, prompt length, expert workers and experts, each over its range, Braid alone.

    make bench-growth                           about 10 minutes
    python benchmarks/growth.py --only context  one curve; the others keep what was measured before

Engines answer real prompts, except for the context curve: there a step of the network runs over a cache filled with
noise, because computing a prompt of 128K tokens first would take longer than everything else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from braid.benchmarks import figures, machine
from braid.benchmarks.checkpoints import VOCAB_SIZE, make
from braid.benchmarks.compare import work_dir
from braid.benchmarks.contenders import models
from braid.benchmarks.forward import decode_row, load
from braid.benchmarks.progress import Told
from braid.benchmarks.report import update_page
from braid.benchmarks.rivals.engine_process import Command, EngineFailed, EngineProcess
from braid.benchmarks.rivals.install import BENCH
from braid.benchmarks.roofline import decode_work, measure_machine, typical
from braid.model.config import ModelConfig
from braid.model.families import ops_for
from braid.model.kv_cache import BLOCK_SIZE, LatentCache, blocks_for

RESULTS = Path(__file__).resolve().parent / "results" / "growth.json"
START_TIMEOUT_S, JOB_TIMEOUT_S = 300.0, 900.0
NEW_TOKENS, PROMPT_TOKENS, ROUNDS = 96, 128, 5  # the last of 64 prompts gets its first token after some 32 steps
Rows = list[list[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CURVES, help="some curves only")
    parser.add_argument("--quick", action="store_true", help="the ends of each range, one round; writes no page")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/growth.json")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    out = args.out or (BENCH / "quick-growth.json" if args.quick else RESULTS)
    found = json.loads(out.read_text()) if out.exists() and args.only else {"curves": {}}
    found["machine"] = machine.describe()
    with Told() as told:
        for name in args.only or CURVES:
            told.begin(name)
            try:
                found["curves"][name] = CURVES[name](told, args.quick)
            except EngineFailed as error:
                told.say(f"failed: {error}")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {out}")
    if not args.quick:
        update_page(found, "growth")


def by_concurrency(told: Told, is_quick: bool) -> dict[str, Any]:
    rows: Rows = []
    with engine("small-bf16", 0, kv_tokens=64 * 6 * BLOCK_SIZE) as running:
        for num in ends([1, 2, 4, 8, 16, 32, 64], is_quick, told):
            rows.append([num, *decode_figures(running, num, is_quick)])
    about = f"Colocated, BF16 `small`, prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens; medians of {ROUNDS}."
    return curve("Decode over concurrency", ["concurrency", "TPOT ms", "tokens/s"], rows, about, [running.others_cores])


def by_context(told: Told, is_quick: bool) -> dict[str, Any]:
    threads, dtype = os.cpu_count() or 1, torch.bfloat16
    torch.set_num_threads(threads)
    ops_for(dtype).set_threads(threads)
    path = make("small-bf16", models() / "small-bf16")
    config, seen, others = ModelConfig.from_path(path), [measure_machine(dtype, threads)], list[float]()
    rows: Rows = []
    with torch.inference_mode():
        for context in ends([128, 512, 2048, 8192, 32768, 131072], is_quick, told):
            model = load(path, config, dtype, num_tokens=context + BLOCK_SIZE)
            with machine.OthersCores(list) as meanwhile:
                row = decode_row(model, seen[0], 1, context, repeats=3 if is_quick else 15)
            others.append(meanwhile.cores)
            cache = blocks_for(context + 1) * LatentCache.block_bytes(config, dtype) / 2**20
            resident = psutil.Process().memory_info().rss / 2**20
            rows.append([context, row.median_ms, 0.0, 1e3 / row.median_ms, cache, resident])
            del model
            gc.collect()
            seen.append(measure_machine(dtype, threads))
    for row_of_context in rows:
        work = decode_work(config, 1, row_of_context[0])
        row_of_context[2] = 1e3 * work.seconds(typical(seen), dtype.itemsize)
    about = (
        "One sequence, BF16 `small`, one step of the network in one process, without an engine around it; the latent "
        "cache holds noise. Memory is that of the process with weights, torch and cache."
    )
    columns = ["context", "TPOT ms", "floor ms", "tokens/s", "latent cache MiB", "memory MiB"]
    return curve("Decode over context", columns, rows, about, others) | {"y": "TPOT ms"}


def by_prompt(told: Told, is_quick: bool) -> dict[str, Any]:
    rows: Rows = []
    with engine("small-bf16", 0, kv_tokens=3 * 8192) as running:
        for length in ends([128, 512, 2048, 8192], is_quick, told):
            seconds = [
                figures.time_to_first_token_s(running.run(prompts(1, length), 1, JOB_TIMEOUT_S).times_s)
                for _ in range(1 if is_quick or length > 4096 else ROUNDS)
            ]
            rows.append([length, length / statistics.median(seconds), statistics.median(seconds)])
    about = f"Colocated, BF16 `small`, one prompt at a time; medians of {ROUNDS}, of the longest once."
    columns = ["prompt", "tokens/s", "seconds"]
    return curve("Time to first token over prompt length", columns, rows, about, [running.others_cores])


def by_expert_workers(told: Told, is_quick: bool) -> dict[str, Any]:
    rows: Rows = []
    others = []
    for workers in ends([1, 2, 3, 4], is_quick, told):
        with engine("small-bf16", workers) as running:
            for num in (1, 32):
                rows.append([workers, num, *decode_figures(running, num, is_quick)])
            others.append(running.others_cores)
    about = (
        "One attention worker, BF16 `small`, one replica of each expert. All workers share the same cores, so more of "
        "them can only cost: this is the price of cutting finer. Attention uses both cores, one expert worker in turn "
        "with it too, several one each."
    )
    columns = ["workers", "c", "TPOT ms", "tokens/s"]
    return curve("Decode over expert workers", columns, rows, about, others) | {"by": ["c"]}


def by_experts(told: Told, is_quick: bool) -> dict[str, Any]:
    rows: Rows = []
    others = []
    for experts in ends([16, 32, 64, 128, 256], is_quick, told):
        with engine(f"growth-{experts}-bf16", 0) as running:
            for num in (1, 32):
                rows.append([experts, num, *decode_figures(running, num, is_quick)])
            others.append(running.others_cores)
    about = (
        "Colocated, BF16, hidden 512, 4 layers, top-6. More experts change nothing for one token; of a batch's tokens "
        "each may ask for others, so more weights are read."
    )
    return curve("Decode over experts", ["experts", "c", "TPOT ms", "tokens/s"], rows, about, others) | {"by": ["c"]}


CURVES: dict[str, Callable[[Told, bool], dict[str, Any]]] = {
    "concurrency": by_concurrency,
    "context": by_context,
    "prompt": by_prompt,
    "workers": by_expert_workers,
    "experts": by_experts,
}


def curve(title: str, columns: Sequence[str], rows: Rows, about: str, others_cores: Sequence[float]) -> dict[str, Any]:
    """Drawn as its last column over its first, unless the caller says otherwise."""
    about += f" Others used {max(others_cores):.2f} cores at most."
    return {"title": title, "columns": columns, "rows": rows, "about": about, "x": columns[0], "y": columns[-1]}


def ends(sizes: Sequence[int], is_quick: bool, told: Told) -> Iterator[int]:
    chosen = [sizes[0], sizes[-2]] if is_quick else sizes
    told.expect(len(chosen))
    for size in chosen:
        told.say(f"{size:,}")
        yield size
        told.advance()


@contextmanager
def engine(checkpoint: str, expert_workers: int, kv_tokens: int = 32 * 320) -> Iterator[EngineProcess]:
    """Raises EngineFailed."""
    path = make(checkpoint, models() / checkpoint)
    arguments = [str(path), str(os.cpu_count() or 1), str(expert_workers), str(kv_tokens)]
    command = Command([sys.executable, "-m", "braid.benchmarks.rivals.braid", *arguments])
    with EngineProcess("growth", command, BENCH / "growth.log", work_dir()) as running:
        running.wait_ready(START_TIMEOUT_S)
        with running.awake():
            yield running


def decode_figures(running: EngineProcess, num: int, is_quick: bool) -> tuple[float, float]:
    """Time per output token in ms and tokens/s, medians over the rounds."""
    tpot, speed = [], []
    for _ in range(1 if is_quick else ROUNDS):
        times = running.run(prompts(num, PROMPT_TOKENS), NEW_TOKENS, JOB_TIMEOUT_S).times_s
        speed.append(figures.decode_tokens_per_s(times))
        tpot.append(1e3 * num / speed[-1])
    return statistics.median(tpot), statistics.median(speed)


def prompts(count: int, length: int) -> list[list[int]]:
    """Random and never the same: no prefix cache can know them."""
    drawn: list[list[int]] = np.random.default_rng().integers(3, VOCAB_SIZE, (count, length)).tolist()
    return drawn


if __name__ == "__main__":
    main()
