"""The one table of a checkpoint's tensors: name, shape, and the role that needs it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from .config import ModelConfig

Role = Literal["attention", "experts", "mtp"]
Shape = tuple[int, ...]
ALL_ROLES: tuple[Role, ...] = ("attention", "experts", "mtp")


def expected_tensors(config: ModelConfig, roles: Collection[Role] = ALL_ROLES) -> dict[str, Shape]:
    """Names and unquantised shapes.

    "attention" = all but routed experts, "experts" = routed experts of the main layers,
    "mtp" = the whole MTP modules, their routed experts included.
    """
    tensors: dict[str, Shape] = {}
    layers = range(config.num_hidden_layers)
    if "attention" in roles:
        tensors.update(_ends(config))
        for layer in layers:
            tensors.update(layer_tensors(config, layer))
    if "experts" in roles:
        for layer in layers:
            tensors.update(expert_tensors(config, layer))
    if "mtp" in roles:
        for layer in mtp_layers(config):
            tensors.update(_mtp_tensors(config, layer))
    return tensors


def optional_tensors(config: ModelConfig) -> frozenset[str]:
    """Names of `expected_tensors` that a good checkpoint may lack.

    transformers writes num_nextn_predict_layers=1 for models without any MTP weights, so whole modules may be absent
    (all or nothing, by `eh_proj`); and a module's embedding and head are copies of the main ones (`mtp_copies`),
    which some leave out.
    """
    roles: tuple[Role, ...] = ("mtp",)
    return frozenset(expected_tensors(config, roles))


def mtp_copies(config: ModelConfig) -> frozenset[str]:
    """The MTP tensors that only repeat the main embedding and head."""
    endings = ("embed_tokens.weight", "shared_head.head.weight")
    return frozenset(f"model.layers.{layer}.{ending}" for layer in mtp_layers(config) for ending in endings)


def is_quantised_in_fp8(name: str) -> bool:
    """The matrices that DeepSeek stores as block fp8: attention and MLP projections, shared and routed experts."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight")


def mtp_layers(config: ModelConfig) -> range:
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """One decoder layer without routed experts."""
    prefix = f"model.layers.{layer}."
    hidden = config.hidden_size
    tensors: dict[str, Shape] = {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
    }
    tensors.update((f"{prefix}self_attn.{name}", shape) for name, shape in _attention(config))
    if not config.is_moe_layer(layer):
        tensors.update(_mlp(prefix + "mlp.", hidden, config.intermediate_size))
        return tensors
    num_experts = config.n_routed_experts or 0
    tensors[prefix + "mlp.gate.weight"] = (num_experts, hidden)
    if config.topk_method == "noaux_tc":
        tensors[prefix + "mlp.gate.e_score_correction_bias"] = (num_experts,)
    if config.n_shared_experts:
        tensors.update(_mlp(prefix + "mlp.shared_experts.", hidden, config.shared_intermediate_size))
    return tensors


def expert_tensors(config: ModelConfig, layer: int, expert_ids: Collection[int] | None = None) -> dict[str, Shape]:
    """The routed experts of one layer; none where the layer is dense."""
    tensors: dict[str, Shape] = {}
    if config.is_moe_layer(layer):
        for expert in range(config.n_routed_experts or 0) if expert_ids is None else expert_ids:
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            tensors.update(_mlp(prefix, config.hidden_size, config.moe_intermediate_size))
    return tensors


def _ends(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def _attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.q_lora_rank is None:
        yield "q_proj.weight", (heads * config.qk_head_dim, hidden)
    else:
        yield "q_a_proj.weight", (config.q_lora_rank, hidden)
        yield "q_a_layernorm.weight", (config.q_lora_rank,)
        yield "q_b_proj.weight", (heads * config.qk_head_dim, config.q_lora_rank)
        if config.attention_bias:
            yield "q_a_proj.bias", (config.q_lora_rank,)
    yield "kv_a_proj_with_mqa.weight", (config.latent_dim, hidden)
    yield "kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield "kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield "o_proj.weight", (hidden, heads * config.v_head_dim)
    if config.attention_bias:
        yield "kv_a_proj_with_mqa.bias", (config.latent_dim,)
        yield "o_proj.bias", (hidden,)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (intermediate, hidden)
    yield prefix + "up_proj.weight", (intermediate, hidden)
    yield prefix + "down_proj.weight", (hidden, intermediate)


def _mtp_tensors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    prefix, hidden = f"model.layers.{layer}.", config.hidden_size
    return {
        prefix + "embed_tokens.weight": (config.vocab_size, hidden),
        prefix + "enorm.weight": (hidden,),
        prefix + "hnorm.weight": (hidden,),
        prefix + "eh_proj.weight": (hidden, 2 * hidden),
        prefix + "shared_head.norm.weight": (hidden,),
        prefix + "shared_head.head.weight": (config.vocab_size, hidden),
        **layer_tensors(config, layer),
        **expert_tensors(config, layer),
    }
