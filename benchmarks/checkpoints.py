"""Random DeepSeek-V3-architecture checkpoints for measurements: no training, no download, repeatable.

    python benchmarks/checkpoints.py small-bf16 .bench/models/small-bf16

`small` has V3's own sizes per head and about half a billion parameters; the `growth-E` ones differ in their number of
experts only. Names ending in -bf16 hold the -fp32 weights rounded. The tokenizer is that of the bundled model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braid.model.config import ModelConfig
from braid.model.shard_writer import Planned, ShardWriter
from braid.model.tensor_names import expected_tensors

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
VOCAB_SIZE = 4096
_SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "first_k_dense_replace": 1,
    "intermediate_size": 2048,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_GROWTH: dict[str, Any] = {**_SMALL, "hidden_size": 512, "num_hidden_layers": 4, "q_lora_rank": 128}
SHAPES: dict[str, dict[str, Any]] = {"small": _SMALL} | {
    f"growth-{experts}": {**_GROWTH, "n_routed_experts": experts} for experts in (16, 32, 64, 128, 256)
}
DTYPES = {"fp32": ("float32", "F32", torch.float32), "bf16": ("bfloat16", "BF16", torch.bfloat16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[f"{shape}-{dtype}" for shape in SHAPES for dtype in DTYPES])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    path = make(args.name, args.out)
    print(f"{path}: {ModelConfig.from_path(path).num_hidden_layers} layers, {size_of(path) / 1e6:.0f} MB")


def make(name: str, path: Path, seed: int = 0) -> Path:
    """Writes the checkpoint `name` (such as "small-bf16") unless it is there, and returns its folder."""
    shape, _, dtype = name.rpartition("-")
    if shape not in SHAPES or dtype not in DTYPES:
        raise ValueError(f"no checkpoint {name!r}; the shapes are {', '.join(SHAPES)}, followed by -fp32 or -bf16")
    if (path / "model.safetensors").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    torch_name, stored, to = DTYPES[dtype]
    (path / "config.json").write_text(json.dumps(config_of(SHAPES[shape], torch_name), indent=1) + "\n")
    for file in TOKENIZER_FILES:
        shutil.copy2(BUNDLED / file, path / file)
    tensors = expected_tensors(ModelConfig.from_path(path))
    planned = [Planned(n, "F32" if is_bias(n) else stored, dims) for n, dims in tensors.items()]
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(path / "model.safetensors", planned, {"format": "pt"}) as shard:
        for tensor, dims in tensors.items():
            value = draw(tensor, dims, generator)
            shard.write(tensor, value if is_bias(tensor) else value.to(to))
    return path


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """As the network is initialised, but for an embedding that is wider than what layers add to it: tokens stay apart.

    Otherwise greedy decoding falls into one repeated token, with which a whole batch asks for the same few experts; and
    in layers as strong as trained ones, random as they are, a last bit of bfloat16 soon decides on other experts.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * (0.5 if "embed_tokens" in name else 0.02)


def is_bias(name: str) -> bool:
    """The gate's bias, which published checkpoints keep in fp32."""
    return name.endswith("e_score_correction_bias")


def config_of(shape: dict[str, Any], torch_dtype: str) -> dict[str, Any]:
    """config.json with the words of transformers 4 and of transformers 5, as the rivals read one or the other."""
    yarn = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    yarn["original_max_position_embeddings"] = 4096
    return {
        **shape,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", **yarn},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **yarn},
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": torch_dtype,
        "torch_dtype": torch_dtype,
    }


def num_parameters(shape: str) -> int:
    config = ModelConfig.from_dict(config_of(SHAPES[shape], "float32"))
    return sum(math.prod(dims) for dims in expected_tensors(config).values())


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


if __name__ == "__main__":
    main()
