"""The native family of operations: kernels of this package, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import native, native_attention, native_rows, native_tape
from ..kernels.attention import KV_SPLIT
from ..kernels.native import PackedMatrix, PackedStack
from .config import ModelConfig

CPU = torch.device("cpu")
FAMILY = "native-avx512-1"  # the number changes when the kernels' bits do


@dataclass(frozen=True, slots=True)
class DecodePlan:
    positions: Tensor  # int64 [R]
    block_tables: Tensor  # int64 [R, width]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    start: int
    num: int
    block_table: Tensor  # int64 [width]


@dataclass(frozen=True, slots=True)
class NativeOps:
    """See `Ops` for the shapes."""

    @property
    def family(self) -> str:
        return FAMILY

    @property
    def device(self) -> torch.device:
        return CPU

    @property
    def kv_split(self) -> int:
        return KV_SPLIT

    def set_threads(self, num_threads: int, max_threads: int | None = None) -> None:
        """Torch computes nothing that is worth a second thread, and its idle ones would spin against ours."""
        torch.set_num_threads(1)
        native.set_threads(max_threads or num_threads)

    def noted(self, work: Callable[[], object]) -> Callable[[], object]:
        return native_tape.noted(work)

    def operand(self, rows: Tensor, take: object) -> Tensor:
        return rows

    def tensor(self, x: Tensor) -> Tensor:
        return x

    def keeps_fp8(self, rows: Sequence[int], columns: int) -> bool:
        return False

    def pack(self, weight: Tensor, is_gate_up: bool = False) -> PackedMatrix:
        return native.pack(weight, is_gate_up)

    def pack_gate(self, weight: Tensor) -> PackedMatrix:
        """In the model's dtype: its products with rows of that dtype are exact in fp32."""
        return native.pack(weight)

    def pack_heads(self, weights: Tensor) -> PackedStack:
        return native.pack_stack(weights)

    def pack_experts(self, weights: Tensor, is_gate_up: bool = False) -> PackedStack:
        return native.pack_stack(weights, is_gate_up)

    def linear(self, x: Tensor, weight: PackedMatrix, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return native.linear(x, weight, bias, out)

    def wide_linear(self, x: Tensor, weight: PackedMatrix, out: Tensor | None = None) -> Tensor:
        return native.linear(x, weight, None, out, fp32_out=True)

    def head_linear(self, x: Tensor, weights: PackedStack, out: Tensor | None = None) -> Tensor:
        return native.head_linear(x, weights, out)

    def swiglu_mlp(self, x: Tensor, w13: PackedMatrix, w2: PackedMatrix, out: Tensor | None = None) -> Tensor:
        return native.swiglu_mlp(x, w13, w2, out)

    def grouped_mlp(
        self,
        x: Tensor,
        row_of_pair: Tensor,
        expert_of_pair: Tensor,
        w13: PackedStack,
        w2: PackedStack,
        out: Tensor | None = None,
    ) -> Tensor:
        return native.grouped_mlp(x, row_of_pair, expert_of_pair, w13, w2, out)

    def gather(self, table: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        return native_rows.gather(table, rows, out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return native_rows.rms_norm(x, weight, eps, out)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return native_rows.add_rms_norm(x, delta, weight, eps, out)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor | None = None) -> Tensor:
        return native_rows.rope(x, cos, sin, interleaved, out)

    def write_latents(
        self,
        latent: Tensor,
        norm_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        cache_layer: Tensor,
        interleaved: bool,
    ) -> None:
        native_rows.write_latents(latent, norm_weight, eps, cos, sin, slots, cache_layer, interleaved)

    def plan_decode(
        self,
        positions: Tensor,
        block_tables: Tensor,
        firsts: Tensor,
        num_heads: int,
        latent_dim: int,
        before: DecodePlan | None = None,
    ) -> DecodePlan:
        return DecodePlan(positions, block_tables) if before is None else before

    def mla_decode(
        self,
        q: Tensor,
        cache_layer: Tensor,
        plan: DecodePlan,
        softmax_scale: float,
        kv_lora_rank: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return native_attention.mla_decode(
            q, cache_layer, plan.positions, plan.block_tables, softmax_scale, kv_lora_rank, out
        )

    def plan_prefill(self, start: int, num: int, block_table: Tensor) -> PrefillPlan:
        return PrefillPlan(start, num, block_table)

    def mla_prefill(
        self,
        q: Tensor,
        cache_layer: Tensor,
        kv_b: PackedMatrix,
        plan: PrefillPlan,
        softmax_scale: float,
        v_head_dim: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return native_attention.mla_prefill(
            q, cache_layer, kv_b, plan.start, plan.num, plan.block_table, softmax_scale, v_head_dim, out
        )

    def route(
        self,
        logits: Tensor,
        correction_bias: Tensor | None,
        config: ModelConfig,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return native_rows.route(
            logits,
            correction_bias,
            config.scoring_func,
            config.topk_method,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
            out,
        )

    def combine(self, shared: Tensor | None, rows: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
        return native_rows.combine(shared, rows, topk_weights, out)
