"""Serving speed of a colocated and a disaggregated cluster, side by side in one run, over gRPC.

    python benchmarks/serve.py [--model DIR] [--dtype float32] [--out benchmarks/results/serve.json]

Both clusters are up at once and idle while the other one is measured; every figure is the median of `--repeats` rounds,
in which the two take turns. Decode speed counts tokens after the first; the floor is the time that the bytes and the
multiplications of a step need on this machine at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from braid.cluster import braid_v1_pb2 as pb
from braid.cluster import braid_v1_pb2_grpc
from braid.model.config import ModelConfig

BRAID = Path(sys.executable).parent / "braid"
NEW_TOKENS, PROMPT_TOKENS, LONG_PROMPT = 64, 128, 1024
SHAPES = {"colocated": ["--experts", "colocated"], "disaggregated": ["--experts", "2"]}


@dataclass
class Target:
    """A running cluster."""

    name: str
    grpc_port: int
    start_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp"), help="a folder outside the repository to start in")
    args = parser.parse_args()
    targets = []
    try:
        for index, (name, options) in enumerate(SHAPES.items()):
            targets.append(start(name, options, 18900 + 10 * index, args))
        result = machine(args) | {"start_s": {t.name: round(t.start_s, 1) for t in targets}}
        result["rounds"] = asyncio.run(rounds(targets, args))
        result["hops"] = {t.name: hop_counters(t, args.work) for t in targets}
    finally:
        for target in targets:
            braid("down", "--name", target.name, cwd=args.work)
    show(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def braid(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([str(BRAID), *arguments], cwd=cwd, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"braid {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def start(name: str, options: list[str], port: int, args: argparse.Namespace) -> Target:
    began = time.monotonic()
    ports = ["--http-port", str(port), "--grpc-port", str(port + 1)]
    flags = ["--name", name, "--detach", "--model", args.model, "--dtype", args.dtype]
    braid("up", *flags, *options, *ports, cwd=args.work)
    return Target(name, port + 1, time.monotonic() - began)


def hop_counters(target: Target, work: Path) -> dict[str, Any]:
    """Sums over the attention workers: where the expert hop's time went."""
    status = json.loads(braid("status", "--name", target.name, "--json", cwd=work))
    counters = [worker.get("counters", {}) for worker in status["workers"] if worker["role"] != "expert"]
    keys = ("steps", "hops", "dispatch_rows", "dispatch_bytes", "combine_bytes", "expert_wait_s", "expert_compute_s")
    return {key: sum(c.get(key, 0) for c in counters) for key in keys}


async def rounds(targets: list[Target], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """figure -> cluster -> one value a round."""
    figures: dict[str, dict[str, list[float]]] = {}
    channels = {t.name: grpc.aio.insecure_channel(f"127.0.0.1:{t.grpc_port}") for t in targets}
    for round_number in track(range(args.repeats + 1), description="rounds"):  # the first one warms up
        for target in targets:
            stub = braid_v1_pb2_grpc.BraidStub(channels[target.name])
            found = {"ttft_1024_ms": 1e3 * (await one(stub, LONG_PROMPT, 1, round_number))[0]}
            for concurrency in args.concurrency:
                found |= await load(stub, concurrency, round_number)
            for figure, value in found.items() if round_number else ():
                figures.setdefault(figure, {}).setdefault(target.name, []).append(value)
    for channel in channels.values():
        await channel.close()
    return figures


async def load(stub: Any, concurrency: int, salt: int) -> dict[str, float]:
    answers = await asyncio.gather(*[one(stub, PROMPT_TOKENS, NEW_TOKENS, salt * 100 + i) for i in range(concurrency)])
    first = max(start for start, _, _ in answers)
    last = max(end for _, end, _ in answers)
    per_token = [(end - start) / (count - 1) for start, end, count in answers]
    tokens = sum(count - 1 for _, _, count in answers)
    return {
        f"tokens_per_s_c{concurrency}": tokens / max(last - first, 1e-9) if concurrency == 1 else tokens / last,
        f"tpot_ms_c{concurrency}": 1e3 * statistics.median(per_token),
    }


async def one(stub: Any, num_prompt: int, num_new: int, salt: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and how many came."""
    ids = [(7919 * (i + 1) * (salt + 1)) % 4000 + 3 for i in range(num_prompt)]
    sampling = pb.Sampling(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    began = time.monotonic()
    first, count = 0.0, 0
    async for response in stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling)):
        count += len(response.token_ids)
        first = first or time.monotonic() - began
    return first, time.monotonic() - began, count


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Name, measured rates, and the floor of one decode step of the model at batch 1."""
    path = Path(args.model)
    if args.model == "bundled":
        path = Path(str(__import__("braid").__path__[0])) / "model" / "bundled"
    config = ModelConfig.from_path(path)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    buffer = torch.empty(64 << 20, dtype=torch.float32)
    target = torch.empty_like(buffer)
    copy_s = best(lambda: target.copy_(buffer))
    a, b = torch.randn(512, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    mm_s = best(lambda: a @ b)
    from braid.model.inventory import describe

    active = sum(part.activated for part in describe(path).parts)
    bandwidth = 2 * buffer.numel() * 4 / copy_s  # one read and one write
    return {
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "model": str(args.model),
        "dtype": args.dtype,
        "layers": config.num_hidden_layers,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "matmul_gflop_s": round(2 * 512 * 1024 * 1024 / mm_s / 1e9, 1),
        "activated_parameters": active,
        "floor_tpot_ms_c1": round(1e3 * active * dtype.itemsize / bandwidth, 3),
    }


def best(work: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']} in {result['dtype']}: {result['machine']}")
    for column in ("figure", "colocated", "disaggregated", "ratio"):
        table.add_column(column, justify="right")
    for figure, values in result["rounds"].items():
        cells = [f"{statistics.median(v):.4g} ({min(v):.4g}..{max(v):.4g})" for v in values.values()]
        ratio = statistics.median(values["disaggregated"]) / statistics.median(values["colocated"])
        table.add_row(figure, *cells, f"{ratio:.2f}")
    table.add_row("start-up, s", *[str(s) for s in result["start_s"].values()], "")
    Console(width=110).print(table)
    Console().print({key: value for key, value in result.items() if key not in ("rounds", "start_s")})


if __name__ == "__main__":
    main()
