"""Cost of one step of the network in one process with all experts: decode at several batch sizes, and prefill.

    python benchmarks/forward.py [--model DIR] [--dtype bfloat16] [--out benchmarks/results/forward.json]

The machine is shared: of `--repeats` rounds the median and the best are told. The floor of a step is the larger of its
bytes at the read bandwidth and its multiplications at the matmul rate, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from braid.benchmarks.roofline import Machine, decode_work, measure_machine, prefill_work, timed
from braid.model.checkpoint import Checkpoint
from braid.model.config import ModelConfig
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.families import ops_for
from braid.model.kv_cache import BLOCK_SIZE, LatentCache, blocks_for
from braid.model.weights import load_attention, load_experts

CONTEXT = 160
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    tokens: int
    median_ms: float
    best_ms: float
    floor_ms: float

    @property
    def share_of_floor(self) -> float:
        return self.floor_ms / self.best_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = Path(__file__).parent.parent / "model" / "bundled"
    parser.add_argument("--model", type=Path, default=bundled)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--prompt", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    ops_for(dtype).set_threads(args.threads)
    config = ModelConfig.from_path(args.model)
    machine = measure_machine(dtype, args.threads)
    most = max([*args.prompt, *(num * (args.context + 2 * BLOCK_SIZE) for num in args.batch)])
    model = load(args.model, config, dtype, num_tokens=most)
    rows = [decode_row(model, machine, num, args.context, args.repeats) for num in args.batch]
    rows += [prefill_row(model, machine, num, max(args.repeats // 3, 3)) for num in args.prompt]
    show(f"{args.model.name} {args.dtype}", machine, rows)
    if args.out is not None:
        told = {"model": args.model.name, "dtype": args.dtype, "machine": asdict(machine), "context": args.context}
        told["rows"] = [asdict(row) for row in rows]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(told, indent=1) + "\n")


def load(path: Path, config: ModelConfig, dtype: torch.dtype, num_tokens: int) -> DeepSeekModel:
    checkpoint, ops = Checkpoint(path), ops_for(dtype)
    every = range(config.n_routed_experts or 0)
    experts = load_experts(checkpoint, config, range(config.num_hidden_layers), every, dtype, ops=ops)
    cache = LatentCache(config, blocks_for(num_tokens), dtype)
    for layer in cache.layers:
        layer.normal_(generator=torch.Generator().manual_seed(0))
    weights = load_attention(checkpoint, config, dtype, ops=ops)
    return DeepSeekModel(config, weights, cache, LocalExperts(experts))


def decode_row(model: DeepSeekModel, machine: Machine, num: int, context: int, repeats: int) -> Row:
    per_sequence = blocks_for(context + 1)
    tables = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(num)]
    ids = _token_ids(model, num)

    def step() -> None:
        segments = [Segment(context, 1, table, absorbed=True) for table in tables]
        model.forward(Batch(ids, segments, torch.arange(num)))

    median_s, best_s = timed(step, repeats)
    floor_s = decode_work(model.config, num, context).seconds(machine, model.cache.dtype.itemsize)
    return Row(f"decode {num}", num, median_s * 1e3, best_s * 1e3, floor_s * 1e3)


def prefill_row(model: DeepSeekModel, machine: Machine, num: int, repeats: int) -> Row:
    table = list(range(blocks_for(num)))
    ids = _token_ids(model, num)

    def prompt() -> None:
        for start in range(0, num, CHUNK):
            part = ids[start : start + CHUNK]
            segment = Segment(start, len(part), table, absorbed=False)
            model.forward(Batch(part, [segment], torch.tensor([len(part) - 1])))

    median_s, best_s = timed(prompt, repeats)
    floor_s = prefill_work(model.config, num).seconds(machine, model.cache.dtype.itemsize)
    return Row(f"prefill {num}", num, median_s * 1e3, best_s * 1e3, floor_s * 1e3)


def _token_ids(model: DeepSeekModel, num: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (num,), generator=torch.Generator().manual_seed(1))


def show(title: str, machine: Machine, rows: list[Row]) -> None:
    table = Table(title=f"{title}: {machine.name}, {machine.threads} threads")
    for column in ("", "median ms", "best ms", "tokens/s (best)", "floor ms", "share of floor"):
        table.add_column(column, justify="right")
    for row in rows:
        speed = f"{row.tokens / row.best_ms * 1e3:.0f}"
        figures = (f"{row.median_ms:.2f}", f"{row.best_ms:.2f}", speed, f"{row.floor_ms:.2f}")
        table.add_row(row.what, *figures, f"{row.share_of_floor:.0%}")
    Console(width=110).print(table)
    Console().print(f"read {machine.read_gb_s:.1f} GB/s, matmul {machine.matmul_gflop_s:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
