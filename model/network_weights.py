"""The network's weights, packed for one family of operations, and how to build them from the checkpoint's names.

MTP convention, for the engine and for training alike (it is what transformers and the known engines feed the
published modules):
  hidden = the main model's output AFTER `model.norm`, i.e. the very rows that `lm_head` reads;
  x      = eh_proj(concat(enorm(embed(token i+1)), hnorm(hidden i)))      embedding half first
  logits = shared_head.head(shared_head.norm(decoder_layer(x)))           predicts token i+2
The decoder layer is an ordinary one with its own attention, at the positions i of `hidden`; embedding and head are
the main model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.quant import BlockFp8
from .config import ModelConfig
from .ops import Matrix, Ops, Stack, Weight
from .torch_ops import TorchOps

# Gives the named tensors, one below the other, as floats or, where the family keeps it, as the checkpoint's fp8.
# So what reads from disk can fill a joined tensor in place.
Read = Callable[..., Any]
PLAIN = TorchOps()


@dataclass(frozen=True, slots=True)
class MlpWeights:
    w13: Matrix  # [2I, H]: gate_proj rows, then up_proj rows
    w2: Matrix  # [H, I]: down_proj


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer without its routed experts. Without q_lora, `qkv_a_proj` gives the queries themselves."""

    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    qkv_a_proj: Matrix  # [q_lora + latent_dim, H]: q_a_proj (or q_proj) rows, then kv_a_proj_with_mqa rows
    kv_a_layernorm: Tensor
    kv_b_proj: Matrix  # [heads * (d_nope + d_v), kv_lora], for the MHA form
    w_uk: Stack  # heads of [kv_lora, d_nope]: kv_b_proj again, for the absorbed form
    w_uv: Stack  # heads of [d_v, kv_lora]
    o_proj: Matrix  # [H, heads * d_v]
    q_a_layernorm: Tensor | None = None
    q_b_proj: Matrix | None = None
    qkv_a_bias: Tensor | None = None
    o_proj_bias: Tensor | None = None
    mlp: MlpWeights | None = None
    gate_weight: Matrix | None = None  # [E, H]
    e_score_correction_bias: Tensor | None = None  # [E] fp32
    shared: MlpWeights | None = None


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """One MTP module (layer id num_hidden_layers + depth); see the convention in this file's docstring."""

    enorm: Tensor
    hnorm: Tensor
    eh_proj: Matrix  # [H, 2H]
    layer: LayerWeights
    shared_head_norm: Tensor
    shared_head: Matrix  # [vocab, H]; the main lm_head unless the checkpoint ships another
    embed_tokens: Tensor  # [vocab, H]; the main one unless the checkpoint ships another
    ops: Ops  # the family that the matrices are packed for, here and below


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Everything an attention worker holds: all but the routed experts."""

    embed_tokens: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Matrix
    ops: Ops
    mtp: tuple[MtpWeights, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Some routed experts of one layer; row e of the stacks is logical expert expert_ids[e]."""

    w13: Stack  # [E, 2I, H]
    w2: Stack  # [E, H, I]
    expert_ids: tuple[int, ...]
    ops: Ops = PLAIN


def build_attention_weights(config: ModelConfig, read: Read, has: Callable[[str], bool], ops: Ops) -> AttentionWeights:
    """`read(*names)` gives tensors in the wanted dtype; MTP modules are built where the checkpoint has them."""
    embed_tokens = read("model.embed_tokens.weight")
    lm_head = ops.pack(embed_tokens if config.tie_word_embeddings else read("lm_head.weight"))
    first_mtp = config.num_hidden_layers
    mtp_layers = range(first_mtp, first_mtp + config.num_nextn_predict_layers)
    return AttentionWeights(
        embed_tokens=embed_tokens,
        layers=tuple(build_layer(config, layer, read, ops) for layer in range(config.num_hidden_layers)),
        norm=read("model.norm.weight"),
        lm_head=lm_head,
        ops=ops,
        mtp=tuple(
            build_mtp(config, layer, read, has, ops, embed_tokens, lm_head)
            for layer in mtp_layers
            if has(f"model.layers.{layer}.eh_proj.weight")
        ),
    )


def build_layer(config: ModelConfig, layer: int, read: Read, ops: Ops) -> LayerWeights:
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    has_q_lora = config.q_lora_rank is not None
    is_moe = config.is_moe_layer(layer)
    gate_bias = prefix + "mlp.gate.e_score_correction_bias"
    query = attention + ("q_a_proj.weight" if has_q_lora else "q_proj.weight")
    kv_b_proj, w_uk, w_uv = _kv_b(config, read(attention + "kv_b_proj.weight"), ops)
    return LayerWeights(
        input_layernorm=read(prefix + "input_layernorm.weight"),
        post_attention_layernorm=read(prefix + "post_attention_layernorm.weight"),
        qkv_a_proj=ops.pack(read(query, attention + "kv_a_proj_with_mqa.weight")),
        kv_a_layernorm=read(attention + "kv_a_layernorm.weight"),
        kv_b_proj=kv_b_proj,
        w_uk=w_uk,
        w_uv=w_uv,
        o_proj=ops.pack(read(attention + "o_proj.weight")),
        q_a_layernorm=read(attention + "q_a_layernorm.weight") if has_q_lora else None,
        q_b_proj=ops.pack(read(attention + "q_b_proj.weight")) if has_q_lora else None,
        qkv_a_bias=_qkv_a_bias(config, attention, read),
        o_proj_bias=read(attention + "o_proj.bias") if config.attention_bias else None,
        mlp=None if is_moe else build_mlp(prefix + "mlp.", read, ops),
        gate_weight=ops.pack_gate(read(prefix + "mlp.gate.weight")) if is_moe else None,
        e_score_correction_bias=read(gate_bias).float() if is_moe and config.topk_method == "noaux_tc" else None,
        shared=build_mlp(prefix + "mlp.shared_experts.", read, ops) if is_moe and config.n_shared_experts else None,
    )


def _kv_b(config: ModelConfig, weight: Weight, ops: Ops) -> tuple[Matrix, Stack, Stack]:
    if isinstance(weight, BlockFp8):  # a head's part of it does not begin where a block of scales does
        weight = weight.to_float(torch.bfloat16)
    heads = weight.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, -1)
    w_uk = heads[:, : config.qk_nope_head_dim].transpose(1, 2)
    return ops.pack(weight), ops.pack_heads(w_uk), ops.pack_heads(heads[:, config.qk_nope_head_dim :])


def _qkv_a_bias(config: ModelConfig, attention: str, read: Read) -> Tensor | None:
    """A query projection that is not low-rank has none: zeros."""
    if not config.attention_bias:
        return None
    kv_bias = read(attention + "kv_a_proj_with_mqa.bias")
    if config.q_lora_rank is not None:
        return torch.cat((read(attention + "q_a_proj.bias"), kv_bias))
    return torch.cat((kv_bias.new_zeros(config.num_attention_heads * config.qk_head_dim), kv_bias))


def build_mlp(prefix: str, read: Read, ops: Ops) -> MlpWeights:
    w13, w2 = read(prefix + "gate_proj.weight", prefix + "up_proj.weight"), read(prefix + "down_proj.weight")
    if isinstance(w2, BlockFp8) and not isinstance(w13, BlockFp8):  # its halves were not whole blocks of scales
        w2 = w2.to_float(torch.bfloat16)
    return MlpWeights(w13=ops.pack(w13, is_gate_up=True), w2=ops.pack(w2))


def build_mtp(
    config: ModelConfig,
    layer: int,
    read: Read,
    has: Callable[[str], bool],
    ops: Ops,
    embed_tokens: Tensor,
    lm_head: Matrix,
) -> MtpWeights:
    prefix = f"model.layers.{layer}."
    embed_name, head_name = prefix + "embed_tokens.weight", prefix + "shared_head.head.weight"
    return MtpWeights(
        enorm=read(prefix + "enorm.weight"),
        hnorm=read(prefix + "hnorm.weight"),
        eh_proj=ops.pack(read(prefix + "eh_proj.weight")),
        layer=build_layer(config, layer, read, ops),
        shared_head_norm=read(prefix + "shared_head.norm.weight"),
        shared_head=ops.pack(read(head_name)) if has(head_name) else lm_head,
        embed_tokens=read(embed_name) if has(embed_name) else embed_tokens,
        ops=ops,
    )


def build_experts(layer: int, expert_ids: Sequence[int], read: Read, ops: Ops) -> ExpertWeights:
    prefix = f"model.layers.{layer}.mlp.experts."
    names = [f"{prefix}{expert}." for expert in expert_ids]
    w13 = torch.stack([read(name + "gate_proj.weight", name + "up_proj.weight") for name in names])
    w2 = torch.stack([read(name + "down_proj.weight") for name in names])
    return ExpertWeights(ops.pack_experts(w13, is_gate_up=True), ops.pack_experts(w2), tuple(expert_ids), ops)


def from_state_dict(
    config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, ops: Ops = PLAIN
) -> tuple[AttentionWeights, dict[int, ExpertWeights]]:
    """A whole network in memory (tests, training); serving loads by role instead."""

    def read(*names: str) -> Tensor:
        joined = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        wide = names[0].endswith("e_score_correction_bias")
        return joined.to(ops.device, torch.float32 if wide else dtype)

    attention = build_attention_weights(config, read, state.__contains__, ops)
    layers = range(config.num_hidden_layers + len(attention.mtp))
    every = range(config.n_routed_experts or 0)
    return attention, {i: build_experts(i, every, read, ops) for i in layers if config.is_moe_layer(i)}
