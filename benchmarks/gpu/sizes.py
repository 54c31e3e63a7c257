"""The models whose shapes are compiled, checked and timed: DeepSeek-V3's own, the bundled one's, and a tiny one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from braid.model.config import ModelConfig, Quantization

BLOCK_SIZE = 64  # tokens of a cache block on a GPU: one tile of keys

V3 = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
)
BUNDLED = ModelConfig.from_path(Path(__file__).resolve().parents[2] / "model" / "bundled")
# One to three tiles a dimension, as Triton's interpreter takes some 20 ms for each.
TINY = replace(
    V3,
    vocab_size=500,
    hidden_size=256,
    intermediate_size=128,
    moe_intermediate_size=128,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    quantization=Quantization(),
)
MODELS = {"v3": V3, "bundled": BUNDLED, "tiny": TINY}
