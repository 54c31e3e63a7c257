"""Cases of MLA: the write into the latent cache, rope, decode in the absorbed form, prefill in the MHA form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from braid.kernels.gpu import attention_decode, attention_prefill, gemm, heads, latent
from braid.model.config import ModelConfig

from .cases import Case, Draw, Run, Target, Work
from .sizes import BLOCK_SIZE


def row_cases(config: ModelConfig, rows: int) -> Iterator[Case]:
    num_heads, rope = config.num_attention_heads, config.qk_rope_head_dim
    yield Case(
        "latent norm + rope + cache write", f"{config.latent_dim}", rows, Work(rows * config.latent_dim * 4), 0.004,
        lambda draw: _write(draw, config, rows),
    )  # fmt: skip
    yield Case(
        "rope", f"{num_heads} x {rope}", rows, Work(rows * num_heads * rope * 4), 0.004,
        lambda draw: _rope(draw, config, rows),
    )  # fmt: skip
    nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
    for name, inputs, outputs in (("W_UK", nope, rank), ("W_UV", rank, config.v_head_dim)):
        num_bytes = 2 * num_heads * (inputs * outputs + rows * (inputs + outputs))
        yield Case(
            "product of each head", f"{name} {num_heads} x {inputs} -> {outputs}", rows,
            Work(num_bytes, 2.0 * rows * num_heads * inputs * outputs), 0.004,
            partial(_heads, rows=rows, num_heads=num_heads, inputs=inputs, outputs=outputs),
        )  # fmt: skip


def decode_case(config: ModelConfig, sequences: int, context: int, num_heads: int, queries: int = 1) -> Case:
    """`context` keys before and with the newest of `queries` rows a sequence."""
    width, rank, rows = config.latent_dim, config.kv_lora_rank, sequences * queries
    num_bytes = 2.0 * (sequences * context * width + rows * num_heads * (width + rank))
    flop = 2.0 * rows * num_heads * context * (width + rank)
    target = Target("tflop_s", 350) if num_heads >= 128 else Target("bandwidth", 0.75) if num_heads <= 32 else None
    shape = f"{num_heads} heads, context {context}" + (f", {queries} a sequence" if queries > 1 else "")
    return Case(
        "MLA decode", shape, rows, Work(num_bytes, flop), 0.01,
        lambda draw: _decode(draw, config, sequences, context, num_heads, queries),
        target if sequences * context >= 1 << 18 else None,
    )  # fmt: skip


def prefill_case(config: ModelConfig, num: int, start: int = 0, expands: bool = True) -> Case:
    """`num` new rows after `start` cached ones. `expands` False: the keys are there already, attention alone works."""
    num_heads, seen = config.num_attention_heads, num * start + num * (num + 1) / 2
    widths, keys = config.qk_head_dim + config.v_head_dim, start + num
    expansion = 2.0 * keys * config.kv_lora_rank * num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    flop = 2.0 * num_heads * seen * widths + (expansion if expands else 0.0)
    return Case(
        "MLA prefill" if expands else "MLA prefill, attention alone", f"{num_heads} heads, {num} after {start}", num,
        Work(2.0 * num_heads * widths * (num + keys), flop), 0.01,
        lambda draw: _prefill(draw, config, num, start, expands),
        Target("tflop_s", 400) if num >= 4096 and not expands else None,
    )  # fmt: skip


def _write(draw: Draw, config: ModelConfig, rows: int) -> Run:
    rank, rope, width = config.kv_lora_rank, config.qk_rope_head_dim, config.latent_dim
    x, weight = draw.normal(rows, width), draw.normal(rank)
    cos, sin = angles(draw, rows, rope)
    num_blocks = -(-rows // BLOCK_SIZE)
    cache = torch.zeros(num_blocks, BLOCK_SIZE, width, dtype=torch.bfloat16, device=draw.device)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=draw.device)[:rows]

    def actual() -> Tensor:
        latent.write_latents(x, weight, 1e-6, cos, sin, slots, cache, interleaved=True)
        return cache

    def expected() -> Tensor:
        wide = x[:, :rank].double()
        normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6) * weight.double()
        written = torch.zeros(num_blocks * BLOCK_SIZE, width, dtype=torch.float64, device=draw.device)
        written[slots] = torch.cat((normed, _turned(x[:, rank:], cos, sin)), -1)
        return written.view_as(cache)

    return Run(actual, expected)


def _heads(draw: Draw, rows: int, num_heads: int, inputs: int, outputs: int) -> Run:
    """Weights are views of kv_b, as they serve: W_UK with its inputs as rows."""
    x, is_transposed = draw.normal(rows, num_heads, inputs), inputs < outputs
    shape = (inputs, outputs) if is_transposed else (outputs, inputs)
    stored = draw.normal(num_heads, *shape, scale=inputs**-0.5)
    weights = stored.transpose(1, 2) if is_transposed else stored
    return Run(
        lambda: heads.head_linear(x, weights), lambda: torch.einsum("mhk,hnk->mhn", x.double(), weights.double())
    )


def _rope(draw: Draw, config: ModelConfig, rows: int) -> Run:
    q = draw.normal(rows, config.num_attention_heads, config.qk_rope_head_dim)
    cos, sin = angles(draw, rows, config.qk_rope_head_dim)
    return Run(
        lambda: latent.rope(q, cos, sin, True, torch.empty_like(q)), lambda: _turned(q, cos[:, None], sin[:, None])
    )


def angles(draw: Draw, rows: int, rope: int) -> tuple[Tensor, Tensor]:
    half = draw.wide(rows, rope // 2)
    return torch.cat((half.cos(), half.cos()), -1), torch.cat((half.sin(), half.sin()), -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., 0::2].double(), x[..., 1::2].double()
    cos, sin = cos[..., :half].double(), sin[..., :half].double()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def cached(draw: Draw, config: ModelConfig, sequences: int, context: int) -> tuple[Tensor, Tensor]:
    """A layer of the latent cache, and int64 [sequences, width] tables in shuffled order."""
    width = -(-context // BLOCK_SIZE)
    cache = draw.normal(sequences * width, BLOCK_SIZE, config.latent_dim)
    tables = torch.randperm(sequences * width, device=draw.device).view(sequences, width)
    return cache, tables


def _decode(draw: Draw, config: ModelConfig, sequences: int, context: int, num_heads: int, queries: int) -> Run:
    rank, scale = config.kv_lora_rank, config.softmax_scale
    cache, tables = cached(draw, config, sequences, context)
    q = draw.normal(sequences * queries, num_heads, config.latent_dim)
    newest = torch.arange(context - queries, context, device=draw.device)
    positions, row_tables = newest.repeat(sequences), tables.repeat_interleave(queries, 0)
    firsts = torch.arange(0, len(positions), queries, device=draw.device).repeat_interleave(queries)
    plan = attention_decode.plan_decode(positions, row_tables, BLOCK_SIZE, num_heads, firsts)

    def expected() -> Tensor:
        outs = []
        for row, (position, table) in enumerate(zip(positions.tolist(), row_tables, strict=True)):
            keys = cache[table].flatten(0, 1)[: position + 1].double()
            weights = (q[row].double() @ keys.T * scale).softmax(-1)
            outs.append(weights @ keys[:, :rank])
        return torch.stack(outs)

    return Run(lambda: attention_decode.mla_decode(q, cache, plan, scale, rank), expected)


def _prefill(draw: Draw, config: ModelConfig, num: int, start: int, expands: bool) -> Run:
    num_heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rank, end = config.kv_lora_rank, start + num
    cache, tables = cached(draw, config, 1, end)
    q, kv_b = (
        draw.normal(num, num_heads, config.qk_head_dim),
        draw.normal(num_heads * (nope + value), rank, scale=rank**-0.5),
    )
    prepared = draw.normal(0 if expands else end, num_heads * (nope + value))
    plan = attention_prefill.plan_prefill(start, num, tables[0])

    def expand(latents: Tensor) -> Tensor:
        return gemm.linear_bf16(latents, kv_b) if expands else prepared[: len(latents)]

    def expected() -> Tensor:
        """Head by head, as [num, keys] of all heads would not fit; keys rounded to bf16 as the product gives them."""
        latents = cache[tables[0]].flatten(0, 1)[:end].double()
        hidden = torch.ones(num, end, dtype=torch.bool, device=draw.device).triu(start + 1)
        outs = []
        for head, weight in enumerate(kv_b.view(num_heads, nope + value, rank).double()):
            expanded = (latents[:, :rank] @ weight.T).bfloat16().double()
            keys = torch.cat((expanded[:, :nope], latents[:, rank:]), -1)
            scores = q[:, head].double() @ keys.T * config.softmax_scale
            outs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ expanded[:, nope:])
        return torch.stack(outs, 1)

    scale = config.softmax_scale
    return Run(lambda: attention_prefill.mla_prefill(q, cache, expand, plan, scale, rank, value), expected)
