"""The floor under a step: its bytes at this machine's read bandwidth, or its multiplications at its matmul rate.

A model that fits into the caches, as the bundled one does, can be faster: bytes are counted as read from memory.

python benchmarks/roofline.py [--model DIR] [--dtype bfloat16] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import linear

from braid.model.config import ModelConfig

READ_BYTES, REPEATS = 1 << 28, 9


@dataclass(frozen=True, slots=True)
class Machine:
    """`matmul_gflop_s` is of one dtype, `read_gb_s` the best of several ways to read much more than the caches hold."""

    name: str
    threads: int
    read_gb_s: float
    matmul_gflop_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What one step must do at least; `numbers` are read once, of the size of the weights' dtype."""

    numbers: float
    products: float

    def seconds(self, machine: Machine, itemsize: int) -> float:
        read_s = self.numbers * itemsize / (machine.read_gb_s * 1e9)
        return max(read_s, 2 * self.products / (machine.matmul_gflop_s * 1e9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "model" / "bundled")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    config, dtype = ModelConfig.from_path(args.model), getattr(torch, args.dtype)
    machine = measure_machine(dtype, args.threads)
    print(f"{machine.name}: {machine.read_gb_s:.1f} GB/s, {machine.matmul_gflop_s:.0f} GFLOP/s in {args.dtype}")
    for num in (1, 8, 32):
        floor_s = decode_work(config, num, 192).seconds(machine, dtype.itemsize)
        print(f"decode {num}: {num / floor_s:.0f} tokens/s at most")
    print(f"prompt of 2048 tokens: {prefill_work(config, 2048).seconds(machine, dtype.itemsize):.3f} s at least")


def decode_work(config: ModelConfig, num: int, context: int) -> Work:
    """One step of `num` sequences with `context` tokens each, absorbed attention. Experts: as many as uniform
    routing is expected to touch; every other weight once; every latent once."""
    layers, heads, moe_layers = config.num_hidden_layers, config.num_attention_heads, _moe_layers(config)
    experts, top_k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    always = _always(config) + config.vocab_size * config.hidden_size
    touched = experts * (1 - (1 - top_k / experts) ** num) if experts else 0.0
    numbers = always + moe_layers * touched * _expert(config) + num * context * layers * config.latent_dim
    attention = layers * heads * context * (config.latent_dim + config.kv_lora_rank)
    return Work(numbers, num * (always + moe_layers * top_k * _expert(config) + attention))


def prefill_work(config: ModelConfig, num: int) -> Work:
    """One prompt of `num` tokens, causal attention over expanded heads, logits of the last row only."""
    heads, top_k, moe_layers = config.num_attention_heads, config.num_experts_per_tok or 0, _moe_layers(config)
    head = config.vocab_size * config.hidden_size
    numbers = _always(config) + head + moe_layers * (config.n_routed_experts or 0) * _expert(config)
    attention = config.num_hidden_layers * heads * num * num / 2 * (config.qk_head_dim + config.v_head_dim)
    return Work(numbers, num * (_always(config) + moe_layers * top_k * _expert(config)) + head + attention)


def measure_machine(dtype: torch.dtype, threads: int) -> Machine:
    """Takes some seconds and half a GiB. Torch has so many threads meanwhile: the native family leaves it one."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    flat = torch.ones(READ_BYTES // 4)
    matrix, vector = flat.view(-1, 8192), torch.ones(8192)
    narrow, narrow_vector = matrix.bfloat16(), vector.bfloat16()[None]
    _, sum_s = timed(lambda: flat.sum(), REPEATS)
    _, wide_s = timed(lambda: torch.mv(matrix, vector), REPEATS)
    _, narrow_s = timed(lambda: linear(narrow_vector, narrow), REPEATS)
    square = torch.randn(2048, 2048, dtype=torch.float32).to(dtype)
    _, matmul_s = timed(lambda: square @ square, REPEATS)
    torch.set_num_threads(threads_before)
    name = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    read = max(flat.nbytes / sum_s, flat.nbytes / wide_s, narrow.nbytes / narrow_s)
    return Machine(name, threads, read / 1e9, 2 * 2048**3 / matmul_s / 1e9)


def typical(seen: Sequence[Machine]) -> Machine:
    """The medians of what was measured over a run, to set beside medians: the machine's best moments are no floor of
    its usual ones."""
    return replace(
        seen[0],
        read_gb_s=statistics.median(machine.read_gb_s for machine in seen),
        matmul_gflop_s=statistics.median(machine.matmul_gflop_s for machine in seen),
    )


def timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and least seconds, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


def _moe_layers(config: ModelConfig) -> int:
    return sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))


def _expert(config: ModelConfig) -> int:
    return 3 * config.hidden_size * (config.moe_intermediate_size or 0)


def _always(config: ModelConfig) -> int:
    """Numbers of every weight that each token goes through in any case, but the head."""
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    q = hidden * heads * config.qk_head_dim
    if config.q_lora_rank is not None:
        q = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    kv = hidden * config.latent_dim + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = layers * (q + kv + heads * config.v_head_dim * hidden)
    dense = (layers - _moe_layers(config)) * 3 * hidden * config.intermediate_size
    gates = (config.n_routed_experts or 0) * hidden
    return attention + dense + _moe_layers(config) * (gates + (config.n_shared_experts or 0) * _expert(config))


if __name__ == "__main__":
    main()
