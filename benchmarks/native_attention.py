"""Native attention beside torch's on the heads of a small network: time, rates, share of what the machine can do.

    python benchmarks/native_attention.py [--heads 8] [--batches 1 8 32] [--contexts 128 1024 8192 32768]
        [--prompts 512 2048] [--threads 1 2] [--out benchmarks/results/native_attention.json]

Decode steps go from layer to layer of a cache that exceeds the processor's, as a network's do, over shuffled blocks.
Both take turns on the same inputs; medians of `--rounds`. The floor is the larger of reading each latent once at the
read bandwidth, and the multiplications at the matmul rate of this machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from braid.benchmarks.native import COLD_BYTES, Contest, in_turn, measure, measure_machine, show
from braid.kernels import attention, native
from braid.kernels.native_attention import BLOCK_SIZE, mla_decode, mla_prefill

KV_LORA, D_ROPE, D_NOPE, D_V = 512, 64, 128, 128  # of DeepSeek-V3
LATENT = KV_LORA + D_ROPE
SCALE = (D_NOPE + D_ROPE) ** -0.5
MOST_KEYS = 300_000  # of all rows of a decode step: what is longer takes too long, and too much memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 1024, 8192, 32768])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    machine = measure_machine(args.dtypes)
    rows = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        steps = [(batch, context) for context in args.contexts for batch in args.batches]
        contests = [decode_contest(*step, args.heads, dtype) for step in steps if step[0] * step[1] <= MOST_KEYS]
        for contest in [*contests, *prefill_contests(args.prompts, args.heads, dtype)]:
            rows += [measure(contest, name, threads, args.rounds, machine) for threads in args.threads]
    show(machine, rows)
    if args.out is not None:
        told = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(told, indent=1) + "\n")


def decode_contest(batch: int, context: int, heads: int, dtype: torch.dtype) -> Contest:
    width = -(-context // BLOCK_SIZE)
    num_bytes = batch * context * LATENT * dtype.itemsize
    layers = [torch.zeros(batch * width, BLOCK_SIZE, LATENT, dtype=dtype) for _ in range(-(-COLD_BYTES // num_bytes))]
    for layer in layers:
        layer.normal_()
    tables = torch.randperm(batch * width).view(batch, width)
    last = [context - 1] * batch
    q = torch.randn(batch, heads, LATENT).to(dtype)
    out = torch.empty(batch, heads, KV_LORA, dtype=dtype)
    ours = partial(decode_natively, q, torch.tensor(last), tables, out)
    plan = attention.plan_decode(last, tables.tolist(), BLOCK_SIZE, LATENT)
    theirs = partial(decode_by_torch, q, plan)
    num_products = batch * context * heads * (LATENT + KV_LORA)
    return Contest(f"decode {context}", batch, in_turn(layers, ours), in_turn(layers, theirs), num_bytes, num_products)


def decode_natively(
    q: torch.Tensor, last: torch.Tensor, tables: torch.Tensor, out: torch.Tensor, layer: torch.Tensor
) -> None:
    mla_decode(q, layer, last, tables, SCALE, KV_LORA, out)


def decode_by_torch(q: torch.Tensor, plan: attention.DecodePlan, layer: torch.Tensor) -> None:
    attention.mla_decode(q, layer, plan, SCALE, KV_LORA)


def prefill_contests(prompts: list[int], heads: int, dtype: torch.dtype) -> Iterator[Contest]:
    kv_b = (torch.randn(heads * (D_NOPE + D_V), KV_LORA) / KV_LORA**0.5).to(dtype)
    packed = native.pack(kv_b)
    for num in prompts:
        table = torch.randperm(-(-num // BLOCK_SIZE))
        layer = torch.randn(len(table), BLOCK_SIZE, LATENT).to(dtype)
        q = torch.randn(num, heads, D_NOPE + D_ROPE).to(dtype)
        out = torch.empty(num, heads, D_V, dtype=dtype)
        plan = attention.plan_prefill(0, num, table.tolist(), BLOCK_SIZE)
        expanding = num * KV_LORA * heads * (D_NOPE + D_V)
        attending = num * (num + 1) // 2 * heads * (D_NOPE + D_ROPE + D_V)
        yield Contest(
            "prefill",
            num,
            partial(mla_prefill, q, layer, packed, 0, num, table, SCALE, D_V, out),
            partial(attention.mla_prefill, q, layer, kv_b, plan, SCALE, D_V),
            (layer.numel() + kv_b.numel() + q.numel() + out.numel()) * dtype.itemsize,
            expanding + attending,
        )


if __name__ == "__main__":
    main()
