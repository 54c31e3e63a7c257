"""Start-up proof, on this machine and for this model's shapes, that a row's bits do not depend on its neighbours.

BLAS libraries differ by processor, version and thread count in how a product's shape moves its rounding. A worker that
could answer a token differently beside other tokens must not join the cluster (DESIGN law 5); it says so here, in about
a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..kernels.attention import KV_SPLIT
from .config import ModelConfig
from .kv_cache import BLOCK_SIZE
from .ops import Ops
from .tensor_names import expert_tensors, layer_tensors

NUM_ROWS = 40
SLICES = ((0, 1), (39, 40), (1, 3), (2, 5), (3, 7), (4, 9), (0, 11), (7, 15), (5, 38))
MAX_WEIGHT = 1 << 19  # numbers; of a larger matrix some output columns are tested: rounding goes along its depth
MAX_HEADS = 8


class SelfTestError(RuntimeError):
    """This machine computes a row differently beside other rows: do not serve on it."""


Random = Callable[..., Tensor]


@torch.inference_mode()
def self_test(
    config: ModelConfig, dtype: torch.dtype, ops: Ops, role: Literal["attention", "experts"] = "attention"
) -> None:
    """Raises SelfTestError that names the kernel and the shape."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    _test_linear(config, role, ops, random)
    if role == "attention":
        _test_row_kernels(config, ops, random)
        _test_heads(config, ops, random)
        _test_attention(config, ops, random)
    if config.n_routed_experts is not None:
        _test_grouped_mlp(config, ops, random)


def _test_slices(kernel: str, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
    """`compute` works row by row."""
    whole = compute(rows)
    for first, last in SLICES:
        _compare(kernel, f"{last - first} rows of {NUM_ROWS}", compute(rows[first:last]), whole[first:last])


def _test_linear(config: ModelConfig, role: str, ops: Ops, random: Random) -> None:
    moe_layer = config.num_hidden_layers - 1
    tensors = expert_tensors(config, moe_layer, (0,))
    if role == "attention":
        tensors = {**tensors, **layer_tensors(config, 0), **layer_tensors(config, moe_layer)}
        tensors["lm_head"] = (config.vocab_size, config.hidden_size)
        queries = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
        tensors["qkv_a_proj"] = (queries + config.latent_dim, config.hidden_size)
    for outputs, inputs in sorted({shape for shape in tensors.values() if len(shape) == 2}):
        weight = ops.pack(random(max(min(outputs, MAX_WEIGHT // inputs), 1), inputs))
        _test_slices(f"linear [{outputs}, {inputs}]", random(NUM_ROWS, inputs), partial(ops.linear, weight=weight))


def _test_row_kernels(config: ModelConfig, ops: Ops, random: Random) -> None:
    hidden, inner = config.hidden_size, config.moe_intermediate_size or config.intermediate_size
    if config.n_routed_experts is not None:
        gate = ops.pack_gate(random(config.n_routed_experts, hidden))
        _test_slices("gate", random(NUM_ROWS, hidden), partial(ops.wide_linear, weight=gate))
    norm = partial(ops.rms_norm, weight=random(hidden), eps=config.rms_norm_eps)
    _test_slices("rms_norm", random(NUM_ROWS, hidden), norm)
    w13, w2 = ops.pack(random(2 * inner, hidden), is_gate_up=True), ops.pack(random(hidden, inner))
    _test_slices("swiglu_mlp", random(NUM_ROWS, hidden), partial(ops.swiglu_mlp, w13=w13, w2=w2))


def _test_heads(config: ModelConfig, ops: Ops, random: Random) -> None:
    """Both absorbed projections."""
    heads = min(config.num_attention_heads, MAX_HEADS)
    for inputs, outputs in (
        (config.qk_nope_head_dim, config.kv_lora_rank),
        (config.kv_lora_rank, config.v_head_dim),
    ):
        weights = ops.pack_heads(random(heads, outputs, inputs))
        project = partial(ops.head_linear, weights=weights)
        _test_slices(f"head_linear [{outputs}, {inputs}]", random(NUM_ROWS, heads, inputs), project)


def _test_attention(config: ModelConfig, ops: Ops, random: Random) -> None:
    """A sequence a little longer than one split, whole and in parts, in both forms, with unwritten rows poisoned."""
    heads, length = min(config.num_attention_heads, MAX_HEADS), KV_SPLIT + 9
    blocks = torch.arange(length // BLOCK_SIZE, -1, -1)
    cache = random(len(blocks), BLOCK_SIZE, config.latent_dim)
    cache[int(blocks[-1]), length % BLOCK_SIZE :] = float("nan")
    scale, value_dim, lora = config.softmax_scale, config.v_head_dim, config.kv_lora_rank
    kv_b_proj = ops.pack(random(heads * (config.qk_nope_head_dim + value_dim), lora))
    start = length - NUM_ROWS
    q = random(NUM_ROWS, heads, config.qk_head_dim)

    def prefill(first: int, last: int) -> Tensor:
        plan = ops.plan_prefill(start + first, last - first, blocks)
        return ops.mla_prefill(q[first:last], cache, kv_b_proj, plan, scale, value_dim)

    absorbed = random(NUM_ROWS, heads, config.latent_dim)

    def decode(first: int, last: int) -> Tensor:
        positions = torch.arange(start + first, start + last)
        plan = ops.plan_decode(positions, blocks.repeat(len(positions), 1), config.latent_dim)
        return ops.mla_decode(absorbed[first:last], cache, plan, scale, lora)

    for kernel, compute in (("mla_prefill", prefill), ("mla_decode", decode)):
        whole = compute(0, NUM_ROWS)
        for first, last in SLICES:
            part = compute(first, last)
            _compare(f"{kernel} {heads} heads", f"{last - first} rows of {NUM_ROWS}", part, whole[first:last])


def _test_grouped_mlp(config: ModelConfig, ops: Ops, random: Random) -> None:
    hidden, inner = config.hidden_size, min(config.moe_intermediate_size, max(MAX_WEIGHT // config.hidden_size, 8))
    w13, w2 = (
        ops.pack_experts(random(3, 2 * inner, hidden), is_gate_up=True),
        ops.pack_experts(random(3, hidden, inner)),
    )
    x, expert = random(NUM_ROWS, hidden), torch.arange(NUM_ROWS) * 7 % 3
    rows = torch.arange(NUM_ROWS)
    whole = ops.grouped_mlp(x, rows, expert, w13, w2)
    for first, last in SLICES:
        part = ops.grouped_mlp(x, rows[first:last], expert[first:last], w13, w2)
        _compare(f"grouped_mlp [{2 * inner}, {hidden}]", f"{last - first} pairs", part, whole[first:last])


def _compare(kernel: str, case: str, part: Tensor, whole: Tensor) -> None:
    if not torch.equal(part, whole):
        raise SelfTestError(
            f"{kernel} in {part.dtype} rounds a row otherwise among {case} (threads: {torch.get_num_threads()}): "
            "answers would depend on the batch. Set cpus: 1 for these workers, or leave this machine out"
        )
