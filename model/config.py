"""Reads config.json of a DeepSeek-V2 or V3 family checkpoint into one frozen value; fields keep its own keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

ModelType = Literal["deepseek_v3", "deepseek_v2"]
ScoringFunc = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "group_limited_greedy", "greedy"]

# Kimi-K2 is DeepSeek-V3's network under another name.
_MODEL_TYPES: dict[str, ModelType] = {
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "deepseek_v2": "deepseek_v2",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN; the only scaling these checkpoints use."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def table_scale(self) -> float:
        """What cos and sin are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


@dataclass(frozen=True, slots=True)
class Quantization:
    """FP8 as DeepSeek ships it: one `weight_scale_inv` per block of an e4m3 weight."""

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    model_type: ModelType
    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int | None
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    moe_layer_freq: int
    n_group: int
    topk_group: int
    topk_method: TopkMethod
    scoring_func: ScoringFunc
    norm_topk_prob: bool
    routed_scaling_factor: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_interleave: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None
    torch_dtype: str | None

    @classmethod
    def from_path(cls, path: str | Path) -> Self:
        """`path` is a checkpoint folder or its config.json; a generation_config.json beside it adds stop tokens."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        values = _read_json(file)
        generation = file.with_name("generation_config.json")
        if generation.is_file():
            extra = _token_ids(_read_json(generation).get("eos_token_id"))
            values = {**values, "eos_token_id": [*_token_ids(values.get("eos_token_id")), *extra]}
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        model_type = _model_type(values)
        is_v3 = model_type == "deepseek_v3"
        for key in _REQUIRED:
            if values.get(key) is None:
                raise ValueError(f"config.json lacks {key!r}, which a {model_type} checkpoint must state")
        rope_theta, rope_scaling = _rope(values)

        read = _Reader(values)
        config = cls(
            model_type=model_type,
            architectures=tuple(read.get("architectures", ())),
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.integer("intermediate_size"),
            moe_intermediate_size=read.integer("moe_intermediate_size", 0),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_nextn_predict_layers=read.integer("num_nextn_predict_layers", read.integer("num_mtp_layers", 0)),
            num_attention_heads=read.integer("num_attention_heads"),
            q_lora_rank=None if values.get("q_lora_rank") is None else read.integer("q_lora_rank"),
            kv_lora_rank=read.integer("kv_lora_rank"),
            qk_nope_head_dim=read.integer("qk_nope_head_dim"),
            qk_rope_head_dim=read.integer("qk_rope_head_dim"),
            v_head_dim=read.integer("v_head_dim"),
            n_routed_experts=None if values.get("n_routed_experts") is None else read.integer("n_routed_experts"),
            n_shared_experts=read.integer("n_shared_experts", 0),
            num_experts_per_tok=read.integer("num_experts_per_tok", 0),
            first_k_dense_replace=read.integer("first_k_dense_replace", 0),
            moe_layer_freq=read.integer("moe_layer_freq", 1),
            n_group=read.integer("n_group", 1),
            topk_group=read.integer("topk_group", 1),
            topk_method=read.get("topk_method", "noaux_tc" if is_v3 else "greedy"),
            scoring_func=read.get("scoring_func", "sigmoid" if is_v3 else "softmax"),
            norm_topk_prob=bool(read.get("norm_topk_prob", is_v3)),
            routed_scaling_factor=read.number("routed_scaling_factor", 1.0),
            max_position_embeddings=read.integer("max_position_embeddings", 4096),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rope_interleave=bool(read.get("rope_interleave", True)),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(read.get("tie_word_embeddings", False)),
            attention_bias=bool(read.get("attention_bias", False)),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(_token_ids(values.get("eos_token_id")))),
            quantization=_quantization(values.get("quantization_config")),
            torch_dtype=read.get("torch_dtype", values.get("dtype")),
        )
        _check(config, read.get("hidden_act", "silu"))
        return config

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers the cache keeps of one token in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale: float = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        """Also right for an MTP layer, whose id is `num_hidden_layers` or above."""
        if self.n_routed_experts is None or layer < self.first_k_dense_replace:
            return False
        return layer % self.moe_layer_freq == 0


@dataclass(frozen=True, slots=True)
class _Reader:
    """null means absent, and a number is a number."""

    values: Mapping[str, Any]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{key} is {value!r}; it must be a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise ValueError(f"{key} is {value!r}; it must be a whole number")
        return int(value)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give a checkpoint folder with config.json, or the file itself")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch the checkpoint's file again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a JSON {type(values).__name__} where an object is needed")
    return values


def _model_type(values: Mapping[str, Any]) -> ModelType:
    name = values.get("model_type")
    if name not in _MODEL_TYPES:
        raise ValueError(f"model_type {name!r} is not supported; supported: {', '.join(_MODEL_TYPES)}")
    return _MODEL_TYPES[name]


def _token_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Published checkpoints say rope_theta and rope_scaling; transformers 5 folds both into rope_parameters."""
    parameters: Mapping[str, Any] = values.get("rope_parameters") or {}
    scaling: Mapping[str, Any] = values.get("rope_scaling") or parameters
    theta = float(parameters.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: default, yarn")
    length = int(values.get("max_position_embeddings") or 4096)
    original = int(scaling.get("original_max_position_embeddings") or length)
    factor = scaling.get("factor")
    attention_factor = scaling.get("attention_factor")
    return theta, RopeScaling(
        factor=length / original if factor is None else float(factor),
        original_max_position_embeddings=original,
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        mscale=float(scaling.get("mscale") or 0.0),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(scaling.get("truncate", True)),
    )


def _quantization(values: Mapping[str, Any] | None) -> Quantization | None:
    if not values:
        return None
    method = values.get("quant_method")
    if method != "fp8":
        raise ValueError(f"quant_method {method!r} is not supported; supported: fp8 (e4m3 with block scales), or none")
    rows, columns = values.get("weight_block_size") or (128, 128)
    return Quantization(weight_block_size=(int(rows), int(columns)), scale_fmt=values.get("scale_fmt"))


def _check(config: ModelConfig, hidden_act: str) -> None:
    """Says which value cannot be, before a single weight is read."""
    for key in (*_REQUIRED, "q_lora_rank", "moe_layer_freq", "n_group", "topk_group", "max_position_embeddings"):
        value = getattr(config, key)
        if value is not None and value <= 0:
            raise ValueError(f"{key} is {value}; it must be positive")
    if hidden_act != "silu":
        raise ValueError(f"hidden_act {hidden_act!r} is not supported; supported: silu")
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim {config.qk_rope_head_dim} is odd; rope turns pairs")
    if config.scoring_func not in ("sigmoid", "softmax"):
        raise ValueError(f"scoring_func {config.scoring_func!r} is not supported; supported: sigmoid, softmax")
    if config.topk_method not in ("noaux_tc", "group_limited_greedy", "greedy"):
        raise ValueError(
            f"topk_method {config.topk_method!r} is not supported; supported: noaux_tc, group_limited_greedy, greedy"
        )
    if config.n_routed_experts is not None:
        _check_experts(config, config.n_routed_experts)


def _check_experts(config: ModelConfig, n_routed_experts: int) -> None:
    if config.moe_intermediate_size <= 0:
        raise ValueError(f"moe_intermediate_size is {config.moe_intermediate_size}; routed experts need a positive one")
    if n_routed_experts % config.n_group:
        raise ValueError(f"n_group {config.n_group} does not divide n_routed_experts {n_routed_experts}")
    if config.topk_group > config.n_group:
        raise ValueError(f"topk_group {config.topk_group} is more than n_group {config.n_group}")
    reachable = n_routed_experts
    if config.topk_method != "greedy":
        reachable = n_routed_experts // config.n_group * config.topk_group
    if not 1 <= config.num_experts_per_tok <= reachable:
        raise ValueError(
            f"num_experts_per_tok {config.num_experts_per_tok} is impossible: a token can reach {reachable} of "
            f"{n_routed_experts} experts (n_group {config.n_group}, topk_group {config.topk_group})"
        )
