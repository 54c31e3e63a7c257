"""The Triton family of operations: kernels for Hopper, in bf16 and, where the checkpoint is, in block fp8.

On a CPU the same code runs in Triton's interpreter, slowly: that is how a whole network is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..kernels.gpu import (
    attention_decode,
    attention_prefill,
    combine,
    experts,
    experts_bf16,
    gate,
    gemm,
    heads,
    mlp,
    norm,
)
from ..kernels.gpu.attention_decode import DecodePlan
from ..kernels.gpu.attention_prefill import PrefillPlan
from ..kernels.gpu.index import dispatch_index
from ..kernels.gpu.latent import rope, write_latents
from ..kernels.gpu.norm import Quantised
from ..kernels.gpu.scales import num_groups
from ..kernels.quant import BLOCK, BlockFp8
from .config import ModelConfig, Quantization
from .cuda_graphs import CudaGraphs
from .kv_cache import BLOCK_SIZE
from .ops import Operand, Take, Weight

FAMILY = "triton-sm90-1"  # the number changes when the kernels' bits do
INTERPRETED = "triton-interpreter-1"
TMA_MULTIPLE = 16  # bytes: what the tensor memory accelerator wants rows of codes to be whole multiples of


class Normed(NamedTuple):
    """What a norm leaves for the products of an fp8 checkpoint: the rows, and the same quantised."""

    rows: Tensor  # bf16 [M, H]
    quantised: Quantised


class GateWeight(NamedTuple):
    """Tells `wide_linear` that logits of the gate are wanted, which have a kernel of their own."""

    weight: Tensor  # [E, H]


class TritonOps:
    """See `Ops` for the shapes; one process is on one device. `quantization`: that of the checkpoint."""

    def __init__(self, device: torch.device, quantization: Quantization | None = None) -> None:
        self._device = device
        self._graphs: CudaGraphs | None = None
        if device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            self._graphs = CudaGraphs(self._device)
        self._has_fp8 = quantization is not None and quantization.weight_block_size == BLOCK
        self._ue8m0 = quantization is not None and quantization.scale_fmt == "ue8m0"
        self._set_allocator()

    @property
    def family(self) -> str:
        return INTERPRETED if self._graphs is None else FAMILY

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def kv_split(self) -> int:
        """The prompt form's, which the other's divides; the interpreter only ever sees short sequences."""
        return BLOCK_SIZE if self._graphs is None else attention_prefill.PIECE

    def set_threads(self, num_threads: int, max_threads: int | None = None) -> None:
        """The host only plans and launches."""
        torch.set_num_threads(1)
        self._set_allocator()

    def _set_allocator(self) -> None:
        """Of memory for a launch's tensor descriptors; Triton keeps it for each thread."""
        triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.int8, device=self._device))

    def noted(self, work: Callable[[], object]) -> Callable[[], object] | None:
        work()
        return None if self._graphs is None else self._graphs.capture(work)

    def operand(self, rows: Tensor, take: Take) -> Operand:
        if not self._has_fp8:
            return rows
        num, width = rows.shape
        scales = take("scales", num_groups(width), torch.float32)
        return Normed(rows, Quantised(take("codes", width, torch.float8_e4m3fn), scales.view(num_groups(width), num)))

    def tensor(self, x: Operand) -> Tensor:
        rows: Tensor = x.rows if isinstance(x, Normed) else x
        return rows

    def _quantised(self, x: Operand) -> Quantised:
        return x.quantised if isinstance(x, Normed) else norm.quantise(x, self._ue8m0)

    def keeps_fp8(self, rows: Sequence[int], columns: int) -> bool:
        """Joined matrices must begin where a block of scales does."""
        return self._has_fp8 and columns % TMA_MULTIPLE == 0 and all(num % BLOCK[0] == 0 for num in rows[:-1])

    def pack(self, weight: Weight, is_gate_up: bool = False) -> Weight:
        return weight if isinstance(weight, BlockFp8) else weight.contiguous()

    def pack_gate(self, weight: Tensor) -> GateWeight:
        return GateWeight(weight.contiguous())

    def pack_heads(self, weights: Tensor) -> Tensor:
        """Views of one kv_b_proj serve both forms."""
        return weights

    def pack_experts(self, weights: Weight, is_gate_up: bool = False) -> Weight:
        return self.pack(weights)

    def linear(self, x: Operand, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if isinstance(weight, BlockFp8):
            return gemm.linear_fp8(self._quantised(x), weight.codes, weight.scales, bias, out)
        return gemm.linear_bf16(self.tensor(x), weight, bias, out)

    def wide_linear(self, x: Operand, weight: Weight | GateWeight, out: Tensor | None = None) -> Tensor:
        rows = self.tensor(x)
        if isinstance(weight, GateWeight):
            return gate.gate_logits(rows, weight.weight, out)
        out = torch.empty(rows.shape[0], _shape(weight)[0], device=self._device) if out is None else out
        return self.linear(x, weight, out=out)

    def head_linear(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        return heads.head_linear(x, weights, out)

    def swiglu_mlp(self, x: Operand, w13: Weight, w2: Weight, out: Tensor | None = None) -> Tensor:
        if isinstance(w13, BlockFp8):
            assert isinstance(w2, BlockFp8), "w13 is fp8 and w2 is not"
            return mlp.swiglu_mlp_fp8(self._quantised(x), *w13, *w2, self._ue8m0, out)
        assert isinstance(w2, Tensor), "w2 is fp8 and w13 is not"
        return mlp.swiglu_mlp_bf16(self.tensor(x), w13, w2, out)

    def grouped_mlp(
        self,
        x: Operand,
        row_of_pair: Tensor,
        expert_of_pair: Tensor,
        w13: Weight,
        w2: Weight,
        out: Tensor | None = None,
    ) -> Tensor:
        """An expert of -1 is somebody else's: `out` keeps what it has."""
        if out is None:
            rows = self.tensor(x)
            out = rows.new_empty(len(row_of_pair), rows.shape[1])
        index = dispatch_index(expert_of_pair, _shape(w13)[0])
        if isinstance(w13, BlockFp8):
            assert isinstance(w2, BlockFp8), "w13 is fp8 and w2 is not"
            return experts.grouped_mlp_fp8(self._quantised(x), row_of_pair, index, *w13, *w2, self._ue8m0, out)
        assert isinstance(w2, Tensor), "w2 is fp8 and w13 is not"
        return experts_bf16.grouped_mlp_bf16(self.tensor(x), row_of_pair, index, w13, w2, out)

    def gather(self, table: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        return torch.index_select(table, 0, rows, out=out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Operand | None = None) -> Operand:
        return self._norm(x, None, weight, eps, out)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Operand | None = None) -> Operand:
        return self._norm(x, delta, weight, eps, out)

    def _norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Operand | None) -> Operand:
        if isinstance(out, Normed):
            norm.add_rms_norm_quantised(x, delta, weight, eps, self._ue8m0, out.rows, out.quantised)
            return out
        return norm.add_rms_norm(x, delta, weight, eps, out)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor | None = None) -> Tensor:
        return rope(x, cos, sin, interleaved, out)

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
        write_latents(latent, norm_weight, eps, cos, sin, slots, cache_layer, interleaved)

    def plan_decode(
        self,
        positions: Tensor,
        block_tables: Tensor,
        firsts: Tensor,
        num_heads: int,
        latent_dim: int,
        before: DecodePlan | None = None,
    ) -> DecodePlan:
        if before is None:
            return attention_decode.plan_decode(positions, block_tables, BLOCK_SIZE, num_heads, firsts)
        attention_decode.refresh(before)
        return before

    def mla_decode(
        self,
        q: Tensor,
        cache_layer: Tensor,
        plan: DecodePlan,
        softmax_scale: float,
        kv_lora_rank: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return attention_decode.mla_decode(q, cache_layer, plan, softmax_scale, kv_lora_rank, out)

    def plan_prefill(self, start: int, num: int, block_table: Tensor) -> PrefillPlan:
        return attention_prefill.plan_prefill(start, num, block_table)

    def mla_prefill(
        self,
        q: Tensor,
        cache_layer: Tensor,
        kv_b: Weight,
        plan: PrefillPlan,
        softmax_scale: float,
        v_head_dim: int,
        out: Tensor | None = None,
    ) -> Tensor:
        expand, rank = partial(self.linear, weight=kv_b), _shape(kv_b)[1]
        return attention_prefill.mla_prefill(q, cache_layer, expand, plan, softmax_scale, rank, v_head_dim, out)

    def route(
        self,
        logits: Tensor,
        correction_bias: Tensor | None,
        config: ModelConfig,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return gate.route(
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
        return combine.combine(shared, rows, topk_weights, out)


def _shape(weight: Weight) -> torch.Size:
    return (weight.codes if isinstance(weight, BlockFp8) else weight).shape
