"""Multi-head latent attention of one layer: projections, rope, the cache write, and both attention forms.

Prompt rows take the MHA form, generated rows the absorbed form; they round differently, so which form a token takes is
part of its identity (DESIGN law 5) and never a matter of convenience.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention import DecodePlan, PrefillPlan, mla_decode, mla_prefill, plan_decode, plan_prefill
from ..kernels.reference import apply_rope, batched_matmul, linear, rms_norm
from .config import ModelConfig
from .kv_cache import BLOCK_SIZE, LatentCache
from .network_weights import LayerWeights

LATENT_NORM_EPS = 1e-6  # DeepSeek's own code leaves the two latent norms at this default, whatever rms_norm_eps says


@dataclass(slots=True)
class Segment:
    """Consecutive positions of one sequence and the form they take: prompt (MHA) or generated (absorbed)."""

    start: int
    num: int
    block_table: list[int]
    absorbed: bool


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attention must know of a batch; made once, used by every layer."""

    positions: Tensor  # int64 [N]
    slots: Tensor  # int64 [N], where each row's latent goes
    prefill: tuple[tuple[slice, PrefillPlan], ...]
    absorbed_rows: Tensor  # int64
    decode: DecodePlan | None


def plan_attention(segments: Sequence[Segment], latent_dim: int) -> AttentionPlan:
    positions: list[int] = []
    slots: list[int] = []
    prefill: list[tuple[slice, PrefillPlan]] = []
    absorbed_rows: list[int] = []
    absorbed_tables: list[list[int]] = []
    for segment in segments:
        first_row = len(positions)
        covered = range(segment.start, segment.start + segment.num)
        positions += covered
        slots += [segment.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in covered]
        if segment.absorbed:
            absorbed_rows += range(first_row, len(positions))
            absorbed_tables += [segment.block_table] * segment.num
        elif segment.num:
            plan = plan_prefill(segment.start, segment.num, segment.block_table, BLOCK_SIZE)
            prefill.append((slice(first_row, len(positions)), plan))
    seen = [positions[row] for row in absorbed_rows]
    return AttentionPlan(
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        prefill=tuple(prefill),
        absorbed_rows=torch.tensor(absorbed_rows, dtype=torch.int64),
        decode=plan_decode(seen, absorbed_tables, BLOCK_SIZE, latent_dim) if seen else None,
    )


class LatentAttention:
    def __init__(self, config: ModelConfig, weights: LayerWeights) -> None:
        self._config = config
        self._weights = weights
        heads = config.num_attention_heads
        kv_b = weights.kv_b_proj.view(heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
        # Copies: a bf16 product copies a strided operand each time, which was a quarter of a small decode step.
        self._w_uk = kv_b[:, : config.qk_nope_head_dim].contiguous()  # [heads, d_nope, kv_lora]
        self._w_uv = kv_b[:, config.qk_nope_head_dim :].transpose(1, 2).contiguous()  # [heads, kv_lora, d_v]

    def write_latents(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: LatentCache, layer: int) -> None:
        """x: [N, H] normed hidden rows; puts their latents into the cache."""
        config, weights = self._config, self._weights
        latent = linear(x, weights.kv_a_proj_with_mqa, weights.kv_a_proj_bias)
        kv, k_rope = latent[:, : config.kv_lora_rank], latent[:, config.kv_lora_rank :]
        kv = rms_norm(kv, weights.kv_a_layernorm, LATENT_NORM_EPS)
        k_rope = apply_rope(k_rope, cos, sin, config.rope_interleave)
        cache.write(layer, slots, torch.cat((kv, k_rope), dim=-1))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, cache_layer: Tensor) -> Tensor:
        """x: [N, H] normed hidden rows whose latents are in the cache -> [N, H]."""
        config, weights = self._config, self._weights
        q_nope, q_rope = self._queries(x, cos, sin)
        out = x.new_empty(x.shape[0], config.num_attention_heads, config.v_head_dim)
        for rows, prefill in plan.prefill:
            q = torch.cat((q_nope[rows], q_rope[rows]), dim=-1)
            out[rows] = mla_prefill(q, cache_layer, weights.kv_b_proj, prefill, config.softmax_scale, config.v_head_dim)
        if plan.decode is not None:
            rows_absorbed = plan.absorbed_rows
            out[rows_absorbed] = self._absorbed(q_nope[rows_absorbed], q_rope[rows_absorbed], plan.decode, cache_layer)
        return linear(out.flatten(1), weights.o_proj, weights.o_proj_bias)

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[N, heads, d_nope] and roped [N, heads, d_rope]."""
        config, weights = self._config, self._weights
        if weights.q_proj is not None:
            q = linear(x, weights.q_proj)
        else:
            assert weights.q_a_proj is not None, "neither q_proj nor q_a_proj"
            assert weights.q_a_layernorm is not None, "q_a_proj without its norm"
            assert weights.q_b_proj is not None, "q_a_proj without q_b_proj"
            q = linear(x, weights.q_a_proj, weights.q_a_proj_bias)
            q = linear(rms_norm(q, weights.q_a_layernorm, LATENT_NORM_EPS), weights.q_b_proj)
        q = q.view(x.shape[0], config.num_attention_heads, config.qk_head_dim)
        q_nope, q_rope = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]
        return q_nope, apply_rope(q_rope, cos[:, None], sin[:, None], config.rope_interleave)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, plan: DecodePlan, cache_layer: Tensor) -> Tensor:
        """The key up-projection is applied to the query, the value up-projection to the attended latent."""
        q_latent = batched_matmul(q_nope.transpose(0, 1), self._w_uk).transpose(0, 1)
        q = torch.cat((q_latent, q_rope), dim=-1)
        latent = mla_decode(q, cache_layer, plan, self._config.softmax_scale, self._config.kv_lora_rank)
        return batched_matmul(latent.transpose(0, 1), self._w_uv).transpose(0, 1)
