"""The network's weights as plain tensors under the checkpoint's own names, and how to build them from those names.

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

import torch
from torch import Tensor

from ..kernels.reference import Stack
from .config import ModelConfig

# Gives the named tensors, one below the other: what reads from disk can then fill a joined tensor in place.
Read = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class MlpWeights:
    w13: Tensor  # [2I, H]: gate_proj rows, then up_proj rows
    w2: Tensor  # [H, I]: down_proj


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer without its routed experts. Either q_proj or the q_a/q_b trio is set."""

    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    kv_a_proj_with_mqa: Tensor  # [kv_lora + d_rope, H]
    kv_a_layernorm: Tensor
    kv_b_proj: Tensor  # [heads * (d_nope + d_v), kv_lora]
    o_proj: Tensor  # [H, heads * d_v]
    q_proj: Tensor | None = None
    q_a_proj: Tensor | None = None
    q_a_layernorm: Tensor | None = None
    q_b_proj: Tensor | None = None
    q_a_proj_bias: Tensor | None = None
    kv_a_proj_bias: Tensor | None = None
    o_proj_bias: Tensor | None = None
    mlp: MlpWeights | None = None
    gate_weight: Tensor | None = None  # [E, H] fp32
    e_score_correction_bias: Tensor | None = None  # [E] fp32
    shared: MlpWeights | None = None


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """One MTP module (layer id num_hidden_layers + depth); see the convention in this file's docstring."""

    enorm: Tensor
    hnorm: Tensor
    eh_proj: Tensor  # [H, 2H]
    layer: LayerWeights
    shared_head_norm: Tensor
    shared_head: Tensor  # [vocab, H]; the main lm_head unless the checkpoint ships another
    embed_tokens: Tensor  # [vocab, H]; the main one unless the checkpoint ships another


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Everything an attention worker holds: all but the routed experts."""

    embed_tokens: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor
    mtp: tuple[MtpWeights, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Some routed experts of one layer; row e of the stacks is logical expert expert_ids[e]."""

    w13: Stack  # [E, 2I, H]
    w2: Stack  # [E, H, I]
    expert_ids: tuple[int, ...]


def build_attention_weights(config: ModelConfig, read: Read, has: Callable[[str], bool]) -> AttentionWeights:
    """`read(*names)` gives tensors in the wanted dtype; MTP modules are built where the checkpoint has them."""
    embed_tokens = read("model.embed_tokens.weight")
    lm_head = embed_tokens if config.tie_word_embeddings else read("lm_head.weight")
    first_mtp = config.num_hidden_layers
    mtp_layers = range(first_mtp, first_mtp + config.num_nextn_predict_layers)
    return AttentionWeights(
        embed_tokens=embed_tokens,
        layers=tuple(build_layer(config, layer, read) for layer in range(config.num_hidden_layers)),
        norm=read("model.norm.weight"),
        lm_head=lm_head,
        mtp=tuple(
            build_mtp(config, layer, read, has, embed_tokens, lm_head)
            for layer in mtp_layers
            if has(f"model.layers.{layer}.eh_proj.weight")
        ),
    )


def build_layer(config: ModelConfig, layer: int, read: Read) -> LayerWeights:
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    has_q_lora = config.q_lora_rank is not None
    is_moe = config.is_moe_layer(layer)
    has_bias = config.attention_bias

    def maybe(condition: bool, name: str) -> Tensor | None:
        return read(name) if condition else None

    gate_bias = maybe(is_moe and config.topk_method == "noaux_tc", prefix + "mlp.gate.e_score_correction_bias")
    gate_weight = maybe(is_moe, prefix + "mlp.gate.weight")
    return LayerWeights(
        input_layernorm=read(prefix + "input_layernorm.weight"),
        post_attention_layernorm=read(prefix + "post_attention_layernorm.weight"),
        kv_a_proj_with_mqa=read(attention + "kv_a_proj_with_mqa.weight"),
        kv_a_layernorm=read(attention + "kv_a_layernorm.weight"),
        kv_b_proj=read(attention + "kv_b_proj.weight"),
        o_proj=read(attention + "o_proj.weight"),
        q_proj=maybe(not has_q_lora, attention + "q_proj.weight"),
        q_a_proj=maybe(has_q_lora, attention + "q_a_proj.weight"),
        q_a_layernorm=maybe(has_q_lora, attention + "q_a_layernorm.weight"),
        q_b_proj=maybe(has_q_lora, attention + "q_b_proj.weight"),
        q_a_proj_bias=maybe(has_bias and has_q_lora, attention + "q_a_proj.bias"),
        kv_a_proj_bias=maybe(has_bias, attention + "kv_a_proj_with_mqa.bias"),
        o_proj_bias=maybe(has_bias, attention + "o_proj.bias"),
        mlp=None if is_moe else build_mlp(prefix + "mlp.", read),
        gate_weight=None if gate_weight is None else gate_weight.float(),
        e_score_correction_bias=None if gate_bias is None else gate_bias.float(),
        shared=build_mlp(prefix + "mlp.shared_experts.", read) if is_moe and config.n_shared_experts else None,
    )


def build_mlp(prefix: str, read: Read) -> MlpWeights:
    w13 = read(prefix + "gate_proj.weight", prefix + "up_proj.weight")
    return MlpWeights(w13=w13, w2=read(prefix + "down_proj.weight"))


def build_mtp(
    config: ModelConfig, layer: int, read: Read, has: Callable[[str], bool], embed_tokens: Tensor, lm_head: Tensor
) -> MtpWeights:
    prefix = f"model.layers.{layer}."
    embed_name, head_name = prefix + "embed_tokens.weight", prefix + "shared_head.head.weight"
    return MtpWeights(
        enorm=read(prefix + "enorm.weight"),
        hnorm=read(prefix + "hnorm.weight"),
        eh_proj=read(prefix + "eh_proj.weight"),
        layer=build_layer(config, layer, read),
        shared_head_norm=read(prefix + "shared_head.norm.weight"),
        shared_head=read(head_name) if has(head_name) else lm_head,
        embed_tokens=read(embed_name) if has(embed_name) else embed_tokens,
    )


def build_experts(layer: int, expert_ids: Sequence[int], read: Read) -> ExpertWeights:
    prefix = f"model.layers.{layer}.mlp.experts."
    experts = [build_mlp(f"{prefix}{expert}.", read) for expert in expert_ids]
    return ExpertWeights(
        w13=torch.stack([expert.w13 for expert in experts]),
        w2=torch.stack([expert.w2 for expert in experts]),
        expert_ids=tuple(expert_ids),
    )


def from_state_dict(
    config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[AttentionWeights, dict[int, ExpertWeights]]:
    """A whole network in memory (tests, training); serving loads by role instead."""

    def read(*names: str) -> Tensor:
        joined = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        return joined.to(torch.float32 if names[0].endswith("e_score_correction_bias") else dtype)

    attention = build_attention_weights(config, read, state.__contains__)
    layers = range(config.num_hidden_layers + len(attention.mtp))
    every = range(config.n_routed_experts or 0)
    return attention, {i: build_experts(i, every, read) for i in layers if config.is_moe_layer(i)}
