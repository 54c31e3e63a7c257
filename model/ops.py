"""The network's operations. Families compute them: torch's reference, native CPU kernels, and Triton (families.py).

A row has the same bits within one family whatever is beside it; two families round differently, so that a cluster runs
one of them only (`family`). Weights are packed for a family and name it (`AttentionWeights.ops`, `ExpertWeights.ops`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.quant import BlockFp8
from .config import ModelConfig

# What a family packed, only for itself to read: a matrix [N, K], or those of all heads or experts.
Matrix = Any
Stack = Any
# A weight before it is packed: floats, or what the checkpoint holds where the family keeps that (`keeps_fp8`).
Weight = Tensor | BlockFp8
# Rows that a norm gives and products read: the tensor itself, or what the family keeps beside it (`Ops.tensor`).
Operand = Any
Take = Callable[[str, int, torch.dtype], Tensor]  # memory that stays, of a step's rows: name, width, dtype


class Ops(Protocol):
    """Tensors of the model's dtype unless said otherwise; rows may be strided; `out` takes the result where given."""

    @property
    def family(self) -> str:
        """Names the bits: two processes whose families are equal round alike."""
        ...

    @property
    def device(self) -> torch.device:
        """Where every tensor lies that the operations read and write."""
        ...

    @property
    def kv_split(self) -> int:
        """Positions of a sequence that attention's sums go over before they are merged with those of others."""
        ...

    def set_threads(self, num_threads: int, max_threads: int | None = None) -> None:
        """Threads of this process that compute, the calling one among them.

        `max_threads`: as many may be used where idle ones leave the cores to other workers.
        """
        ...

    def noted(self, work: Callable[[], object]) -> Callable[[], object] | None:
        """Runs the work; returns what makes its calls again over the same memory, or None where that is no faster."""
        ...

    def operand(self, rows: Tensor, take: Take) -> Operand:
        """`rows`, and memory for what else this family wants its norms to leave for its products."""
        ...

    def tensor(self, x: Operand) -> Tensor:
        """[M, K], the rows themselves."""
        ...

    def keeps_fp8(self, rows: Sequence[int], columns: int) -> bool:
        """Whether `pack` takes such matrices, one below the other, as an fp8 checkpoint holds them (BlockFp8)."""
        ...

    def pack(self, weight: Any, is_gate_up: bool = False) -> Matrix:
        """weight: [N, K], a Tensor, or BlockFp8 where the family keeps that. `is_gate_up`: an MLP's w13, which only the
        MLP operations read."""
        ...

    def pack_gate(self, weight: Tensor) -> Matrix:
        """weight: [E, H]; to be read by `wide_linear`."""
        ...

    def pack_heads(self, weights: Tensor) -> Stack:
        """weights: [heads, N, K]."""
        ...

    def pack_experts(self, weights: Any, is_gate_up: bool = False) -> Stack:
        """weights: [E, N, K]; `is_gate_up` as for `pack`."""
        ...

    def linear(self, x: Operand, weight: Matrix, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x: [M, K], bias: [N] -> [M, N]."""
        ...

    def wide_linear(self, x: Operand, weight: Matrix, out: Tensor | None = None) -> Tensor:
        """x: [M, K] -> fp32 [M, N]: logits of the gate and of the head."""
        ...

    def head_linear(self, x: Tensor, weights: Stack, out: Tensor | None = None) -> Tensor:
        """x: [M, heads, K] -> [M, heads, N], a matrix for each head."""
        ...

    def swiglu_mlp(self, x: Operand, w13: Matrix, w2: Matrix, out: Tensor | None = None) -> Tensor:
        """x: [M, H] -> [M, H]; w13: [2I, H], gate rows first, w2: [H, I]."""
        ...

    def grouped_mlp(
        self,
        x: Operand,
        row_of_pair: Tensor,
        expert_of_pair: Tensor,
        w13: Stack,
        w2: Stack,
        out: Tensor | None = None,
    ) -> Tensor:
        """x: [n, H], row_of_pair, expert_of_pair: int64 [P] -> [P, H], one MLP row a pair; expert = place in stack."""
        ...

    def gather(self, table: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """table: [N, W], rows: int64 [M] -> `out` [M, W]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Operand | None = None) -> Operand:
        """x: [M, H] -> [M, H]."""
        ...

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Operand | None = None) -> Operand:
        """x, delta: [M, H]. Adds delta to x in place and returns the norm of the sum."""
        ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor | None = None) -> Tensor:
        """x: [M, heads, d], cos, sin: fp32 [M, d] with equal halves -> [M, heads, d]."""
        ...

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
        """latent: [M, kv_lora + d_rope]; norms the one part, turns the other, puts both at slots int64 [M]."""
        ...

    def plan_decode(
        self,
        positions: Tensor,
        block_tables: Tensor,
        firsts: Tensor,
        num_heads: int,
        latent_dim: int,
        before: Any = None,
    ) -> Any:
        """positions: int64 [R], block_tables: int64 [R, width], filled up with any block -> what mla_decode takes.

        `firsts`: int64 [R], of each row the first of those whose consecutive positions of one sequence lead to it.
        `before`: what it returned for the same memory when that held something else.
        """
        ...

    def mla_decode(
        self,
        q: Tensor,
        cache_layer: Tensor,
        plan: Any,
        softmax_scale: float,
        kv_lora_rank: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """q: [R, heads, latent_dim], absorbed -> attended latents [R, heads, kv_lora]."""
        ...

    def plan_prefill(self, start: int, num: int, block_table: Tensor) -> Any:
        """block_table: int64 [width] of the sequence whose positions start .. start + num - 1 attend."""
        ...

    def mla_prefill(
        self,
        q: Tensor,
        cache_layer: Tensor,
        kv_b: Matrix,
        plan: Any,
        softmax_scale: float,
        v_head_dim: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """q: [num, heads, d_nope + d_rope] -> [num, heads, d_v]."""
        ...

    def route(
        self,
        logits: Tensor,
        correction_bias: Tensor | None,
        config: ModelConfig,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """logits: fp32 [M, E] -> topk_idx int64 [M, k], topk_weights fp32 [M, k]."""
        ...

    def combine(self, shared: Tensor | None, rows: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
        """shared: [M, H], rows: [M, k, H], topk_weights: fp32 [M, k] -> [M, H]; fp32 sums, shared first, then slots."""
        ...
