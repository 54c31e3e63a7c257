"""Start-up proof, on this machine and for this model's shapes, that a row's bits do not depend on its neighbours.

BLAS libraries differ by processor, version and thread count in how a product's shape moves its rounding. A worker that
could answer a token differently beside other tokens must not join the cluster (DESIGN law 5); it says so here, in about
a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..kernels.attention import KV_SPLIT, mla_decode, mla_prefill, plan_decode, plan_prefill
from ..kernels.reference import batched_matmul, grouped_mlp, linear, packed, rms_norm, swiglu
from .config import ModelConfig
from .kv_cache import BLOCK_SIZE
from .tensor_names import expert_tensors, layer_tensors

NUM_ROWS = 40
SLICES = ((0, 1), (39, 40), (1, 3), (2, 5), (3, 7), (4, 9), (0, 11), (7, 15), (5, 38))
MAX_WEIGHT = 1 << 19  # numbers; of a larger matrix some output columns are tested: rounding goes along its depth
MAX_HEADS = 8


class SelfTestError(RuntimeError):
    """This machine computes a row differently beside other rows: do not serve on it."""


Random = Callable[..., Tensor]


@torch.inference_mode()
def self_test(config: ModelConfig, dtype: torch.dtype, role: Literal["attention", "experts"] = "attention") -> None:
    """Raises SelfTestError that names the kernel and the shape."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for kernel, rows, compute in _row_kernels(config, role, random):
        whole = compute(rows)
        for first, last in SLICES:
            _compare(kernel, f"{last - first} rows of {NUM_ROWS}", compute(rows[first:last]), whole[first:last])
    if role == "attention":
        _test_absorption(config, random)
        _test_attention(config, random)
    if config.n_routed_experts is not None:
        _test_grouped_mlp(config, random)


def _row_kernels(
    config: ModelConfig, role: str, random: Random
) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """(name, rows, function of rows) of every kernel that works row by row."""
    moe_layer = config.num_hidden_layers - 1
    tensors = expert_tensors(config, moe_layer, (0,))
    if role == "attention":
        tensors = {**tensors, **layer_tensors(config, 0), **layer_tensors(config, moe_layer)}
        tensors["lm_head"] = (config.vocab_size, config.hidden_size)
    shapes = sorted({shape for shape in tensors.values() if len(shape) == 2})
    for outputs, inputs in shapes:
        weight = random(max(min(outputs, MAX_WEIGHT // inputs), 1), inputs)
        yield f"linear [{outputs}, {inputs}]", random(NUM_ROWS, inputs), partial(linear, weight=packed(weight))
    if role == "attention" and config.n_routed_experts is not None:
        gate = random(config.n_routed_experts, config.hidden_size).float()
        yield "gate", random(NUM_ROWS, config.hidden_size).float(), partial(linear, weight=gate)
    scale = random(config.hidden_size)
    norm = partial(rms_norm, weight=scale, eps=config.rms_norm_eps)
    yield "rms_norm", random(NUM_ROWS, config.hidden_size), norm
    inner = config.moe_intermediate_size or config.intermediate_size
    yield "swiglu", random(NUM_ROWS, 2 * inner), swiglu


def _test_absorption(config: ModelConfig, random: Random) -> None:
    heads = min(config.num_attention_heads, MAX_HEADS)
    for inputs, outputs in (
        (config.qk_nope_head_dim, config.kv_lora_rank),
        (config.kv_lora_rank, config.v_head_dim),
    ):
        x, weight = random(heads, NUM_ROWS, inputs), random(heads, inputs, outputs)
        whole = batched_matmul(x, weight)
        for first, last in SLICES:
            part = batched_matmul(x[:, first:last], weight)
            _compare(f"batched_matmul [{inputs}, {outputs}]", f"{last - first} rows", part, whole[:, first:last])


def _test_attention(config: ModelConfig, random: Random) -> None:
    """A sequence a little longer than one split, whole and in parts, in both forms, with unwritten rows poisoned."""
    heads, length = min(config.num_attention_heads, MAX_HEADS), KV_SPLIT + 9
    blocks = list(range(length // BLOCK_SIZE, -1, -1))
    cache = random(len(blocks), BLOCK_SIZE, config.latent_dim)
    cache[blocks[-1], length % BLOCK_SIZE :] = float("nan")
    scale, value_dim, lora = config.softmax_scale, config.v_head_dim, config.kv_lora_rank
    kv_b_proj = random(heads * (config.qk_nope_head_dim + value_dim), lora)
    start = length - NUM_ROWS
    q = random(NUM_ROWS, heads, config.qk_head_dim)

    def prefill(first: int, last: int) -> Tensor:
        plan = plan_prefill(start + first, last - first, blocks, BLOCK_SIZE)
        return mla_prefill(q[first:last], cache, kv_b_proj, plan, scale, value_dim)

    absorbed = random(NUM_ROWS, heads, config.latent_dim)

    def decode(first: int, last: int) -> Tensor:
        positions = range(start + first, start + last)
        plan = plan_decode(positions, [blocks] * len(positions), BLOCK_SIZE, config.latent_dim)
        return mla_decode(absorbed[first:last], cache, plan, scale, lora)

    for kernel, compute in (("mla_prefill", prefill), ("mla_decode", decode)):
        whole = compute(0, NUM_ROWS)
        for first, last in SLICES:
            part = compute(first, last)
            _compare(f"{kernel} {heads} heads", f"{last - first} rows of {NUM_ROWS}", part, whole[first:last])


def _test_grouped_mlp(config: ModelConfig, random: Random) -> None:
    hidden, inner = config.hidden_size, min(config.moe_intermediate_size, max(MAX_WEIGHT // config.hidden_size, 8))
    w13 = tuple(packed(random(2 * inner, hidden)) for _ in range(3))
    w2 = tuple(packed(random(hidden, inner)) for _ in range(3))
    x, expert = random(NUM_ROWS, hidden), torch.arange(NUM_ROWS) * 7 % 3
    rows = torch.arange(NUM_ROWS)
    whole = grouped_mlp(x, rows, expert, w13, w2)
    for first, last in SLICES:
        part = grouped_mlp(x, rows[first:last], expert[first:last], w13, w2)
        _compare(f"grouped_mlp [{2 * inner}, {hidden}]", f"{last - first} pairs", part, whole[first:last])


def _compare(kernel: str, case: str, part: Tensor, whole: Tensor) -> None:
    if not torch.equal(part, whole):
        raise SelfTestError(
            f"{kernel} in {part.dtype} rounds a row otherwise among {case} (threads: {torch.get_num_threads()}): "
            "answers would depend on the batch. Set cpus: 1 for these workers, or leave this machine out"
        )
