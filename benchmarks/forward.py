"""Cost of one step of the network in one process with all experts: decode at several batch sizes, and prefill.

    python benchmarks/forward.py [--model DIR] [--dtype bfloat16] [--out benchmarks/results/forward.json]

The machine is shared: of `--repeats` rounds the median and the best are told. The floor of a step is the larger of its
bytes at the read bandwidth and its multiplications at the matmul rate, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from braid.model.checkpoint import Checkpoint
from braid.model.config import ModelConfig
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.kv_cache import BLOCK_SIZE, LatentCache, blocks_for
from braid.model.ops import ops_for
from braid.model.weights import load_attention, load_experts

CONTEXT = 160
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    threads: int
    read_gb_s: float
    matmul_gflop_s: float


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
    parser.add_argument("--prompt", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    ops_for(dtype).set_threads(args.threads)
    config = ModelConfig.from_path(args.model)
    machine = measure_machine(dtype, args.threads)
    model = load(
        args.model, config, dtype, num_tokens=max([*args.prompt, *(n * 2 * BLOCK_SIZE * 2 for n in args.batch)])
    )
    rows = [decode_row(model, machine, num, args.repeats) for num in args.batch]
    rows += [prefill_row(model, machine, num, max(args.repeats // 3, 3)) for num in args.prompt]
    show(f"{args.model.name} {args.dtype}", machine, rows)
    if args.out is not None:
        told = {"model": args.model.name, "dtype": args.dtype, "machine": asdict(machine), "context": CONTEXT}
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


def decode_row(model: DeepSeekModel, machine: Machine, num: int, repeats: int) -> Row:
    per_sequence = blocks_for(CONTEXT + 1)
    tables = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(num)]
    ids = _token_ids(model, num)

    def step() -> None:
        segments = [Segment(CONTEXT, 1, table, absorbed=True) for table in tables]
        model.forward(Batch(ids, segments, torch.arange(num)))

    median_s, best_s = _time(step, repeats)
    return Row(f"decode {num}", num, median_s * 1e3, best_s * 1e3, floor_ms(model, machine, num, CONTEXT))


def prefill_row(model: DeepSeekModel, machine: Machine, num: int, repeats: int) -> Row:
    table = list(range(blocks_for(num)))
    ids = _token_ids(model, num)

    def prompt() -> None:
        for start in range(0, num, CHUNK):
            part = ids[start : start + CHUNK]
            segment = Segment(start, len(part), table, absorbed=False)
            model.forward(Batch(part, [segment], torch.tensor([len(part) - 1])))

    median_s, best_s = _time(prompt, repeats)
    return Row(f"prefill {num}", num, median_s * 1e3, best_s * 1e3, floor_ms(model, machine, num, None))


def floor_ms(model: DeepSeekModel, machine: Machine, num: int, context: int | None) -> float:
    """Weights read once (experts: the number that uniform routing is expected to touch), latents once.

    `context` None: a prompt of `num` tokens by the MHA form; else `num` sequences of that context, absorbed.
    """
    config = model.config
    hidden, heads, moe = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size or 0
    q = hidden * heads * config.qk_head_dim
    if config.q_lora_rank is not None:
        q = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    kv = hidden * config.latent_dim + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    layers = config.num_hidden_layers
    num_moe = sum(config.is_moe_layer(i) for i in range(layers))
    experts, top_k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    fixed = layers * (q + kv + heads * config.v_head_dim * hidden)
    fixed += (layers - num_moe) * 3 * hidden * config.intermediate_size
    fixed += num_moe * hidden * (experts + 3 * (config.n_shared_experts or 0) * moe)
    head = config.vocab_size * hidden
    touched = experts * (1 - (1 - top_k / experts) ** num) if experts else 0.0
    numbers = fixed + head + num_moe * touched * 3 * hidden * moe
    products: float = num * (fixed + num_moe * top_k * 3 * hidden * moe)
    if context is None:
        products += head + layers * heads * num * num / 2 * (config.qk_head_dim + config.v_head_dim)
    else:
        products += num * (head + layers * heads * context * (config.latent_dim + config.kv_lora_rank))
        numbers += num * context * layers * config.latent_dim
    read_s: float = numbers * model.cache.dtype.itemsize / (machine.read_gb_s * 1e9)
    compute_s: float = 2 * products / (machine.matmul_gflop_s * 1e9)
    return 1e3 * max(read_s, compute_s)


def measure_machine(dtype: torch.dtype, threads: int) -> Machine:
    big, square = torch.ones(1 << 26), torch.ones(1024, 1024, dtype=dtype)
    _, read_s = _time(lambda: big.sum(), 9)
    _, matmul_s = _time(lambda: square @ square, 15)
    name = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return Machine(name, threads, big.nbytes / read_s / 1e9, 2 * 1024**3 / matmul_s / 1e9)


def _token_ids(model: DeepSeekModel, num: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (num,), generator=torch.Generator().manual_seed(1))


def _time(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


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
