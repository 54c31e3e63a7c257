"""Writes small random checkpoints in Hugging Face layout, whole or damaged, for the tests of the model room."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from braid.kernels.quant import ScaleFormat, quantise
from braid.model.config import ModelConfig
from braid.model.tensor_names import expected_tensors

SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 144,
    "intermediate_size": 200,
    "moe_intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}

WriteCheckpoint = Callable[..., Path]


def random_state(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_tensors(config).items():
        values = torch.randn(shape, generator=generator) * 0.05 + (1.0 if "norm" in name else 0.0)
        state[name] = values.to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)
    return state


def quantised_state(state: Mapping[str, Tensor], scale_format: ScaleFormat) -> dict[str, Tensor]:
    """All matrices but the ones DeepSeek leaves alone, as its own fp8 checkpoints hold them."""
    quantised = {}
    for name, tensor in state.items():
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight"):
            codes, scale = quantise(tensor, scale_format)
            quantised[name], quantised[name + "_scale_inv"] = codes, scale
        else:
            quantised[name] = tensor
    return quantised


def save_sharded(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], num_shards: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        save_file({name: state[name].contiguous() for name in part}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """dtype: bfloat16, float16, float32, fp8 or ue8m0; `changes` go into the config, `edit` may damage the tensors."""

    def write(
        name: str = "model",
        dtype: str = "bfloat16",
        changes: Mapping[str, Any] | None = None,
        edit: Callable[[dict[str, Tensor]], None] | None = None,
        num_shards: int = 3,
    ) -> Path:
        values = {**SMALL, **(changes or {})}
        is_fp8 = dtype in ("fp8", "ue8m0")
        if is_fp8:
            quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            values["quantization_config"] = {**quantization, "weight_block_size": [128, 128]}
        state = random_state(ModelConfig.from_dict(values), torch.bfloat16 if is_fp8 else getattr(torch, dtype))
        if is_fp8:
            state = quantised_state(state, "ue8m0" if dtype == "ue8m0" else "float32")
        if edit is not None:
            edit(state)
        return save_sharded(tmp_path / name, state, values, num_shards)

    return write
