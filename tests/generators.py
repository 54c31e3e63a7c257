"""Random models of several shapes, made by transformers: the oracle and its checkpoint in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": None,
}
_V3: dict[str, Any] = {**_COMMON, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_mtp_layers": 0}


def _yarn(factor: float, original: int, **more: float) -> dict[str, Any]:
    length = {"factor": factor, "original_max_position_embeddings": original}
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **length, **more}}


# Every shape has max_position_embeddings 1024; those with YaRN were "trained" to 64 or 32, so 65 tokens are past it.
SHAPES: dict[str, dict[str, Any]] = {
    # V3, R1: q_lora, groups, YaRN with both mscales equal
    "v3": {**_V3, **_yarn(16.0, 64, mscale=1.0, mscale_all_dim=1.0)},
    # no q_lora, one group, biases, two shared experts, one head and a half-full last fours of everything
    "v3_odd": {
        **_V3,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "attention_bias": True,
        "n_shared_experts": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "hidden_size": 66,
        "moe_intermediate_size": 30,
        "kv_lora_rank": 22,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
    },
    # Kimi-K2: one group, more experts, no dense layer, the degenerate YaRN ramp
    "kimi": {
        **_V3,
        **_yarn(32.0, 32, mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0, beta_slow=1.0),
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 24,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 0,
    },
    # rope in halves, mscale without mscale_all_dim, unnormalised gate weights, tied head
    "v3_halves": {
        **_V3,
        **_yarn(16.0, 64, mscale=0.7),
        "rope_interleave": False,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
    # V2-Lite: softmax, greedy, no q_lora
    "v2_lite": {
        **_COMMON,
        **_yarn(16.0, 64, mscale=0.707, mscale_all_dim=0.707),
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
    },
    # V2: softmax, groups by their best expert, mscales that differ
    "v2": {
        **_COMMON,
        **_yarn(16.0, 64, mscale=1.0, mscale_all_dim=0.8),
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
    },
}


def make_hf_model(shape_name: str, seed: int = 0, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """An fp32 oracle and its config.json. Weights are as large as a trained model's: every part matters to the logits,
    no norm is all ones, and greedy decoding does not fall into one token."""
    values = {**SHAPES[shape_name], **changes}
    if shape_name.startswith("v2"):
        model: nn.Module = DeepseekV2ForCausalLM(DeepseekV2Config(**values))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            else:
                # A tied embedding that large would make every token predict itself.
                is_wide = "embed_tokens" in name and not values.get("tie_word_embeddings")
                parameter.copy_(noise if is_wide else noise * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.02 * torch.randn(buffer.shape, generator=generator))
    model.set_experts_implementation("eager")  # type: ignore[operator]  # the grouped one refuses odd sizes
    return model.float().eval(), model.config.to_dict()  # type: ignore[operator,union-attr]


def save_hf_model(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Writes config.json, generation_config.json and safetensors (`max_shard_size` cuts them into shards)."""
    model.to(dtype).save_pretrained(path, **options)  # type: ignore[operator]
    return path
