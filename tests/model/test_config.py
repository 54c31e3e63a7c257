"""config.json in all the spellings that checkpoints use, and every impossible one refused with its value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from generators import SHAPES, make_hf_model

from braid.model.config import ModelConfig, RopeScaling

# DeepSeek-V3's published config.json, less what no model of ours reads.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_deepseek_v3() -> None:
    config = ModelConfig.from_dict(V3)
    assert (config.qk_head_dim, config.latent_dim, config.n_routed_experts) == (192, 576, 256)
    assert config.num_hidden_layers * config.latent_dim * 2 == 70272
    assert [config.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert config.rope_scaling == RopeScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert config.quantization is not None
    assert (config.quantization.weight_block_size, config.quantization.scale_fmt) == ((128, 128), None)
    assert (config.eos_token_ids, config.torch_dtype) == ((1,), "bfloat16")


def test_relatives_of_v3() -> None:
    kimi = ModelConfig.from_dict(
        {**V3, "model_type": "kimi_k2", "n_routed_experts": 384, "n_group": 1, "topk_group": 1}
    )
    assert (kimi.model_type, kimi.n_routed_experts) == ("deepseek_v3", 384)
    v31 = ModelConfig.from_dict({**V3, "quantization_config": {**V3["quantization_config"], "scale_fmt": "ue8m0"}})
    assert v31.quantization is not None
    assert v31.quantization.scale_fmt == "ue8m0"


def test_defaults_follow_the_model_type() -> None:
    bare = {k: v for k, v in V3.items() if k not in ("scoring_func", "topk_method", "norm_topk_prob")}
    v3 = ModelConfig.from_dict(bare)
    assert (v3.scoring_func, v3.topk_method, v3.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    v2 = ModelConfig.from_dict({**bare, "model_type": "deepseek_v2", "n_group": None, "topk_group": None})
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob, v2.n_group) == ("softmax", "greedy", False, 1)


def test_a_model_without_experts_is_dense_everywhere() -> None:
    config = ModelConfig.from_dict({**V3, "n_routed_experts": None})
    assert not any(config.is_moe_layer(i) for i in range(62))


def test_every_second_layer_may_be_dense() -> None:
    config = ModelConfig.from_dict({**V3, "moe_layer_freq": 2})
    assert [i for i in range(9) if config.is_moe_layer(i)] == [4, 6, 8]


@pytest.mark.parametrize("shape_name", SHAPES)
def test_transformers_spelling_means_the_same_as_the_published_one(shape_name: str) -> None:
    _, values = make_hf_model(shape_name)
    rope = values.pop("rope_parameters")
    published = {**values, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "yarn":
        published["rope_scaling"] = {"type": "yarn", **{k: v for k, v in rope.items() if k != "rope_type"}}
    assert ModelConfig.from_dict({**values, "rope_parameters": rope}) == ModelConfig.from_dict(published)


def test_yarn_without_a_factor_takes_the_ratio_of_lengths() -> None:
    config = ModelConfig.from_dict({**V3, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}})
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 40.0
    assert config.rope_scaling.table_scale == pytest.approx(0.1 * math.log(40) + 1)
    assert config.softmax_scale == 192**-0.5


def test_path_is_a_folder_or_the_file_and_generation_config_adds_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert ModelConfig.from_path(tmp_path) == ModelConfig.from_dict(V3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert ModelConfig.from_path(tmp_path / "config.json").eos_token_ids == (1, 7)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist; give a checkpoint folder"):
        ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a JSON list where an object is needed"):
        ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type 'llama' is not supported; supported: deepseek_v3"):
        ModelConfig.from_path(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be positive"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a number"),
        ({"num_hidden_layers": 6.5}, r"num_hidden_layers is 6\.5; it must be a whole number"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps is \[1\]; it must be a number"),
        ({"q_lora_rank": -1}, "q_lora_rank is -1"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"scoring_func": "relu"}, "scoring_func 'relu' is not supported"),
        ({"topk_method": "best"}, "topk_method 'best' is not supported"),
        ({"n_group": 7}, "n_group 7 does not divide n_routed_experts 256"),
        ({"topk_group": 9}, "topk_group 9 is more than n_group 8"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is impossible: a token can reach 128 of 256"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0 is impossible"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling 'linear' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**V3, **changes})
