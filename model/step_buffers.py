"""Memory for the intermediate rows of a step: allocated once, used by every layer and by the next step again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .ops import Operand, Ops
from .tapes import Tapes

MAX_VIEWS = 128  # sets of views that are kept, one for each number of rows; so the tapes are bounded too


@dataclass(frozen=True, slots=True)
class StepRows:
    """Views for N rows. What one half layer leaves here is gone when the next one runs."""

    x: Tensor  # [N, H], the residual stream
    normed: Operand  # [N, H]
    delta: Tensor  # [N, H], what a half layer adds to x
    shared: Tensor  # [N, H], the shared expert's rows
    cos: Tensor  # fp32 [N, d_rope]
    sin: Tensor
    qkv_a: Tensor  # [N, q_lora + latent_dim]
    q_a: Tensor  # [N, q_lora]: its front, or the queries themselves where there is no q_lora
    latent: Tensor  # [N, latent_dim]: its rest
    q_a_normed: Operand  # [N, q_lora]
    q_flat: Tensor  # [N, heads * d_qk]
    q: Tensor  # [N, heads, d_qk]: the same
    q_nope: Tensor
    q_rope: Tensor
    values: Tensor  # [N, heads, d_v]
    values_flat: Tensor  # [N, heads * d_v]
    gate: Tensor  # fp32 [N, E]
    topk_idx: Tensor  # int64 [N, k]
    topk_weights: Tensor  # fp32 [N, k]


@dataclass(frozen=True, slots=True)
class AbsorbedRows:
    """Views for the R rows of the absorbed form."""

    q: Tensor  # [R, heads, latent_dim]
    q_latent: Tensor  # its first kv_lora numbers
    q_rope: Tensor
    attended: Tensor  # [R, heads, kv_lora]


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Views for R rows that are read by the head."""

    rows: Tensor  # int64 [R]: which of the N they are
    hidden: Tensor  # [R, H]
    logits: Tensor  # fp32 [R, vocab]


@dataclass(frozen=True, slots=True)
class DecodeNumbers:
    numbers: Tensor  # int64, all of the following, one behind the other
    positions: Tensor  # [N]
    slots: Tensor  # [N]
    firsts: Tensor  # [N]
    block_tables: Tensor  # [N, width]

    @classmethod
    def of(cls, num: int, width: int, device: torch.device | None = None) -> DecodeNumbers:
        numbers = torch.zeros(num * (3 + width), dtype=torch.int64, device=device)
        positions, slots, firsts = numbers[: 3 * num].view(3, num)
        return cls(numbers, positions, slots, firsts, numbers[3 * num :].view(num, width))


class DecodeInputs:
    """Where a batch of absorbed rows only says what it wants: the same memory in every step of that many rows."""

    def __init__(self, num: int, width: int, device: torch.device) -> None:
        self.written = DecodeNumbers.of(num, width)  # by the host
        self.read = self.written  # by the kernels
        if device.type != "cpu":
            self.read = DecodeNumbers.of(num, width, device)
        self.plan: Any = None  # of attention, which names this memory
        self._cells = self.written.numbers.numpy().data  # written one by one: a tenth of what an array costs
        self._tables = self.written.block_tables.numpy()
        self._known: list[list[int]] = [[] for _ in range(num)]  # what stands in each row's table

    def write(self, row: int, position: int, slot: int, first: int) -> None:
        cells, num = self._cells, len(self._known)
        cells[row], cells[num + row], cells[2 * num + row] = position, slot, first

    def write_table(self, row: int, table: list[int]) -> None:
        """From one step to the next most tables stay what they are."""
        if self._known[row] != table:
            self._tables[row, : len(table)] = table
            self._known[row] = table


class StepBuffers:
    """For one micro-batch at a time. `tapes` hold addresses in here and are forgotten when memory moves."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, ops: Ops) -> None:
        self.tapes = Tapes(ops)
        self._config = config
        self._dtype = dtype
        self._ops = ops
        self._memory: dict[str, Tensor] = {}
        self._rows: dict[int, StepRows] = {}
        self._absorbed: dict[int, AbsorbedRows] = {}
        self._pairs: dict[int, Tensor] = {}
        self._wanted: dict[int, WantedRows] = {}
        self._inputs: dict[tuple[int, int], DecodeInputs] = {}

    def rows(self, num: int) -> StepRows:
        if num not in self._rows:
            if len(self._rows) == MAX_VIEWS:
                self._rows.clear()
            made = self._make_rows(num)  # forgets all views where their memory was not enough
            self._rows[num] = made
        return self._rows[num]

    def absorbed(self, num: int) -> AbsorbedRows:
        if num not in self._absorbed:
            if len(self._absorbed) == MAX_VIEWS:
                self._absorbed.clear()
            made = self._make_absorbed(num)
            self._absorbed[num] = made
        return self._absorbed[num]

    def decode_inputs(self, num: int, width: int) -> DecodeInputs:
        """`width`: blocks that the tables must have room for; they get room for up to twice as many."""
        key = num, 1 << max(width - 1, 0).bit_length()
        if key not in self._inputs:
            if len(self._inputs) == MAX_VIEWS:
                self._inputs.clear()
                self.tapes.forget()
            self._inputs[key] = DecodeInputs(*key, self._ops.device)
        return self._inputs[key]

    def pair(self, num: int) -> Tensor:
        """[N, 2H]: what an MTP module joins."""
        if num not in self._pairs:
            if len(self._pairs) == MAX_VIEWS:
                self._pairs.clear()
            made = self._take("pair", num, 2 * self._config.hidden_size)
            self._pairs[num] = made
        return self._pairs[num]

    def wanted(self, num: int) -> WantedRows:
        if num not in self._wanted:
            if len(self._wanted) == MAX_VIEWS:
                self._wanted.clear()
            made = WantedRows(
                self._take("wanted", num, 1, torch.int64).view(num),
                self._take("wanted hidden", num, self._config.hidden_size),
                self._take("logits", num, self._config.vocab_size, torch.float32),
            )
            self._wanted[num] = made
        return self._wanted[num]

    def _make_rows(self, num: int) -> StepRows:
        config, hidden, heads = self._config, self._config.hidden_size, self._config.num_attention_heads
        q_width = heads * config.qk_head_dim
        q_a_width = q_width if config.q_lora_rank is None else config.q_lora_rank
        qkv_a = self._take("qkv_a", num, q_a_width + config.latent_dim)
        q_a = qkv_a[:, :q_a_width]
        q_flat = q_a if config.q_lora_rank is None else self._take("q", num, q_width)
        q = q_flat.view(num, heads, config.qk_head_dim)
        values = self._take("values", num, heads * config.v_head_dim)
        return StepRows(
            x=self._take("x", num, hidden),
            normed=self._take_operand("normed", num, hidden),
            delta=self._take("delta", num, hidden),
            shared=self._take("shared", num, hidden),
            cos=self._take("cos", num, config.qk_rope_head_dim, torch.float32),
            sin=self._take("sin", num, config.qk_rope_head_dim, torch.float32),
            qkv_a=qkv_a,
            q_a=q_a,
            latent=qkv_a[:, q_a_width:],
            q_a_normed=self._take_operand("q_a_normed", num, config.q_lora_rank or 0),
            q_flat=q_flat,
            q=q,
            q_nope=q[..., : config.qk_nope_head_dim],
            q_rope=q[..., config.qk_nope_head_dim :],
            values=values.view(num, heads, config.v_head_dim),
            values_flat=values,
            gate=self._take("gate", num, config.n_routed_experts or 0, torch.float32),
            topk_idx=self._take("topk_idx", num, config.num_experts_per_tok or 0, torch.int64),
            topk_weights=self._take("topk_weights", num, config.num_experts_per_tok or 0, torch.float32),
        )

    def _make_absorbed(self, num: int) -> AbsorbedRows:
        config, heads = self._config, self._config.num_attention_heads
        q = self._take("absorbed", num, heads * config.latent_dim).view(num, heads, config.latent_dim)
        attended = self._take("attended", num, heads * config.kv_lora_rank).view(num, heads, config.kv_lora_rank)
        return AbsorbedRows(q, q[..., : config.kv_lora_rank], q[..., config.kv_lora_rank :], attended)

    def _take_operand(self, name: str, num: int, width: int) -> Operand:
        rows = self._take(name, num, width)
        return self._ops.operand(rows, lambda more, *of: self._take(f"{name} {more}", num, *of))

    def _take(self, name: str, num: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape[0] < num:
            room = 1 << max(num - 1, 0).bit_length()  # so that a batch that grows row by row moves it a few times only
            memory = self._memory[name] = torch.empty(room, width, dtype=dtype or self._dtype, device=self._ops.device)
            for views in (self._rows, self._absorbed, self._pairs, self._wanted):
                views.clear()
            self.tapes.forget()
        return memory[:num]
