"""One DeepSeek-V3 layer as an expert worker and as an attention worker: the calibration a capacity planner reads.

An expert worker's layer is the index and the grouped products of the pairs that uniform routing sends it. An attention
worker's is everything else of an MoE layer, the shared expert with it; hops and the dense first layers are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from braid.kernels.gpu import attention_decode, combine, experts, gate, gemm, heads, index, latent, mlp, norm
from braid.model.config import ModelConfig

from .cases import Draw
from .cases_attention import cached
from .cases_experts import chosen, expert_work
from .setting import Row, Setting, each
from .sizes import BLOCK_SIZE
from .timing import Timing, copies, timed

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HELD = (8, 32)
BATCHES = (1, 8, 32, 128, 512)
CONTEXTS = (1024, 4096, 16384, 131072)
MOST_CACHE_BYTES = 30e9


def measure(setting: Setting) -> Iterator[Row]:
    """Rows {"part": "experts", "held", "tokens", ..} and {"part": "attention", "batch", "context", ..}."""
    tokens, held = (TOKENS, HELD) if setting.is_full_size else ((2,), (2,))
    batches, contexts = (BATCHES, CONTEXTS) if setting.is_full_size else ((2,), (70,))
    names: list[tuple[str, Callable[[], Row]]] = []
    for num_held in held:
        for num in tokens:
            names.append((f"experts, {num_held} held, {num} tokens", partial(_experts, setting, num_held, num)))
    for batch in batches:
        for context in contexts:
            if batch * context * setting.config.latent_dim * 2 <= MOST_CACHE_BYTES:
                work = partial(_attention, setting, batch, context)
                names.append((f"attention, batch {batch}, context {context}", work))
    return each(setting, iter(names))


def _told(part: str, sizes: dict[str, int], tokens: int, took: Timing) -> Row:
    spread = {"us": took.us, "least_us": took.least_us, "most_us": took.most_us}
    return {"part": part} | sizes | spread | {"tokens_per_s": tokens / took.us * 1e6}


def _experts(setting: Setting, held: int, tokens: int) -> Row:
    """The mean of several layers: of few tokens one layer's choice may leave this worker nothing, or what L2 holds."""
    torch.manual_seed(0)
    num_layers = copies(expert_work(setting.config, tokens, held).num_bytes, setting.device)
    runs = [_expert_layer(setting, held, tokens) for _ in range(num_layers)]
    return _told("experts", {"held": held, "tokens": tokens}, tokens, timed(runs, setting.device))


def _expert_layer(setting: Setting, held: int, tokens: int) -> Callable[[], Tensor]:
    config, draw = setting.config, setting.draw
    hidden, inner, slots = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    x, places = draw.activations(tokens, hidden), chosen(draw, config, tokens, held)
    w13, w2 = draw.block_weight(2 * inner, hidden, held), draw.block_weight(hidden, inner, held)
    out = torch.zeros(tokens * slots, hidden, dtype=torch.bfloat16, device=setting.device)
    row_of_pair = torch.arange(tokens, device=setting.device).repeat_interleave(slots)

    def layer() -> Tensor:
        found = index.dispatch_index(places, held)
        return experts.grouped_mlp_fp8(x, row_of_pair, found, *w13, *w2, False, out)

    return layer


def _attention(setting: Setting, batch: int, context: int) -> Row:
    torch.manual_seed(0)
    layer = _AttentionLayer(setting.config, setting.draw, batch, context)
    took = timed([layer.run], setting.device)
    return _told("attention", {"batch": batch, "context": context}, batch, took)


class _AttentionLayer:
    """Weights of one layer and the state of `batch` sequences; run: one decode step of it."""

    def __init__(self, config: ModelConfig, draw: Draw, batch: int, context: int) -> None:
        self.config, hidden, num_heads = config, config.hidden_size, config.num_attention_heads
        q_rank, rank, inner = config.q_lora_rank or 0, config.kv_lora_rank, config.shared_intermediate_size
        self.qkv_a = draw.block_weight(q_rank + config.latent_dim, hidden)
        self.q_b = draw.block_weight(num_heads * config.qk_head_dim, q_rank)
        nope = config.qk_nope_head_dim
        kv_b = draw.normal(num_heads, nope + config.v_head_dim, rank, scale=rank**-0.5)
        self.w_uk, self.w_uv = kv_b[:, :nope].transpose(1, 2), kv_b[:, nope:]
        self.o_proj = draw.block_weight(hidden, num_heads * config.v_head_dim)
        experts = config.n_routed_experts or 1
        self.gate, self.bias = draw.normal(experts, hidden, scale=hidden**-0.5), draw.wide(experts)
        self.w13, self.w2 = draw.block_weight(2 * inner, hidden), draw.block_weight(hidden, inner)
        self.norms = [draw.normal(hidden), draw.normal(hidden), draw.normal(q_rank), draw.normal(rank)]
        self.x, self.delta = draw.normal(batch, hidden), draw.normal(batch, hidden)
        self.cos, self.sin = draw.wide(batch, config.qk_rope_head_dim), draw.wide(batch, config.qk_rope_head_dim)
        self.cache, tables = cached(draw, config, batch, context)
        positions = torch.full((batch,), context - 1, device=draw.device)
        self.slots = tables[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        self.plan = attention_decode.plan_decode(positions, tables, BLOCK_SIZE, num_heads)
        self.rows = draw.normal(batch, config.num_experts_per_tok, hidden)

    def run(self) -> Tensor:
        attended = self._attend(norm.add_rms_norm_quantised(self.x, self.delta, self.norms[0], 1e-6, False))
        normed = torch.empty_like(attended)
        x = norm.add_rms_norm_quantised(self.x, attended, self.norms[1], 1e-6, False, normed)
        config = self.config
        _, weights = gate.route(
            gate.gate_logits(normed, self.gate), self.bias, config.scoring_func, config.topk_method,
            config.num_experts_per_tok, config.n_group, config.topk_group, True, config.routed_scaling_factor,
        )  # fmt: skip
        return combine.combine(mlp.swiglu_mlp_fp8(x, *self.w13, *self.w2, False), self.rows, weights)

    def _attend(self, x: norm.Quantised) -> Tensor:
        config, batch = self.config, len(self.x)
        num_heads, rank, nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
        qkv = gemm.linear_fp8(x, *self.qkv_a)
        q_rank = config.q_lora_rank or 0
        q_a, latents = qkv[:, :q_rank], qkv[:, q_rank:]
        latent.write_latents(latents, self.norms[3], 1e-6, self.cos, self.sin, self.slots, self.cache, interleaved=True)
        q = gemm.linear_fp8(norm.add_rms_norm_quantised(q_a, None, self.norms[2], 1e-6, False), *self.q_b)
        q = q.view(batch, num_heads, -1)
        absorbed = q.new_empty(batch, num_heads, config.latent_dim)
        heads.head_linear(q[..., :nope], self.w_uk, absorbed[..., :rank])
        latent.rope(q[..., nope:], self.cos, self.sin, True, absorbed[..., rank:])
        attended = attention_decode.mla_decode(absorbed, self.cache, self.plan, config.softmax_scale, rank)
        values = heads.head_linear(attended, self.w_uv).flatten(1)
        return gemm.linear_fp8(norm.quantise(values, False), *self.o_proj)
