"""The reference family of operations: torch, on every machine; what training, tests and oracles compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import attention, reference
from ..kernels.attention import KV_SPLIT, DecodePlan, PrefillPlan
from ..router.gate import route
from .config import ModelConfig
from .kv_cache import BLOCK_SIZE

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class TorchOps:
    """See `Ops` for the shapes. `is_packing`: matrices in the layout that torch reads fastest, with the same bits."""

    is_packing: bool = False

    @property
    def family(self) -> str:
        """Torch rounds by its version and by what the CPU can do."""
        return f"reference-torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"

    @property
    def device(self) -> torch.device:
        return CPU

    @property
    def kv_split(self) -> int:
        return KV_SPLIT

    def set_threads(self, num_threads: int, max_threads: int | None = None) -> None:
        """Of the calling thread: OpenMP counts per thread. Its idle threads spin: no more than the share of cores."""
        torch.set_num_threads(num_threads)

    def noted(self, work: Callable[[], object]) -> None:
        work()

    def operand(self, rows: Tensor, take: object) -> Tensor:
        return rows

    def tensor(self, x: Tensor) -> Tensor:
        return x

    def keeps_fp8(self, rows: Sequence[int], columns: int) -> bool:
        return False

    def pack(self, weight: Tensor, is_gate_up: bool = False) -> Tensor:
        return reference.packed(weight) if self.is_packing else weight

    def pack_gate(self, weight: Tensor) -> Tensor:
        return weight.float()

    def pack_heads(self, weights: Tensor) -> Tensor:
        """A copy with its inputs as rows: a bf16 product copies a strided operand each time."""
        return weights.transpose(1, 2).contiguous()

    def pack_experts(self, weights: Tensor, is_gate_up: bool = False) -> Tensor | tuple[Tensor, ...]:
        return tuple(reference.packed(matrix) for matrix in weights) if self.is_packing else weights

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.linear(x, weight, bias))

    def wide_linear(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.linear(x.to(weight.dtype), weight).float())

    def head_linear(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.batched_matmul(x.transpose(0, 1), weights).transpose(0, 1))

    def swiglu_mlp(self, x: Tensor, w13: Tensor, w2: Tensor, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.swiglu_mlp(x, w13, w2))

    def grouped_mlp(
        self,
        x: Tensor,
        row_of_pair: Tensor,
        expert_of_pair: Tensor,
        w13: reference.Stack,
        w2: reference.Stack,
        out: Tensor | None = None,
    ) -> Tensor:
        return _into(out, reference.grouped_mlp(x, row_of_pair, expert_of_pair, w13, w2))

    def gather(self, table: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        return torch.index_select(table, 0, rows, out=out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.rms_norm(x, weight, eps))

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.rms_norm(x.add_(delta), weight, eps))

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.apply_rope(x, cos[:, None], sin[:, None], interleaved))

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
        kv_lora_rank = norm_weight.shape[0]
        kv = reference.rms_norm(latent[:, :kv_lora_rank], norm_weight, eps)
        k_rope = reference.apply_rope(latent[:, kv_lora_rank:], cos, sin, interleaved)
        cache_layer.flatten(0, 1).index_copy_(0, slots, torch.cat((kv, k_rope), dim=-1))

    def plan_decode(
        self,
        positions: Tensor,
        block_tables: Tensor,
        firsts: Tensor,
        num_heads: int,
        latent_dim: int,
        before: DecodePlan | None = None,
    ) -> DecodePlan:
        return attention.plan_decode(positions.tolist(), block_tables.tolist(), BLOCK_SIZE, latent_dim)

    def mla_decode(
        self,
        q: Tensor,
        cache_layer: Tensor,
        plan: DecodePlan,
        softmax_scale: float,
        kv_lora_rank: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return _into(out, attention.mla_decode(q, cache_layer, plan, softmax_scale, kv_lora_rank))

    def plan_prefill(self, start: int, num: int, block_table: Tensor) -> PrefillPlan:
        return attention.plan_prefill(start, num, block_table.tolist(), BLOCK_SIZE)

    def mla_prefill(
        self,
        q: Tensor,
        cache_layer: Tensor,
        kv_b: Tensor,
        plan: PrefillPlan,
        softmax_scale: float,
        v_head_dim: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return _into(out, attention.mla_prefill(q, cache_layer, kv_b, plan, softmax_scale, v_head_dim))

    def route(
        self,
        logits: Tensor,
        correction_bias: Tensor | None,
        config: ModelConfig,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        topk_idx, topk_weights = route(
            logits,
            correction_bias,
            config.scoring_func,
            config.topk_method,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        return (topk_idx, topk_weights) if out is None else (out[0].copy_(topk_idx), out[1].copy_(topk_weights))

    def combine(self, shared: Tensor | None, rows: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
        return _into(out, reference.combine(shared, rows, topk_weights))


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
