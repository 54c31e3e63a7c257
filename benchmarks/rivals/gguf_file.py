"""Writes a checkpoint as GGUF for llama.cpp: architecture deepseek2, MLA in its absorbed form, no tokenizer.

    python -m braid.benchmarks.rivals.gguf_file MODEL_DIR OUT.gguf

Runs in llama.cpp's environment, which has no torch: bfloat16 numbers are moved as they lie in the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, Any]
Config = dict[str, Any]
MLP = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
}


def write(model: Path, out: Path) -> None:
    config: Config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(out.with_suffix(".partial"), "deepseek2")
    describe(writer, config)
    for name, array in tensors(config, read_tensors(model / "model.safetensors")):
        add(writer, name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out.with_suffix(".partial").replace(out)


def describe(writer: Any, config: Config) -> None:
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # absorbed, all heads share one latent head
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config["rope_theta"])
    yarn = config["rope_scaling"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn["factor"])
    writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * yarn["mscale_all_dim"])  # read back divided by 0.1
    is_bf16 = config["torch_dtype"] == "bfloat16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if is_bf16 else gguf.LlamaFileType.ALL_F32)


def tensors(config: Config, held: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Under llama.cpp's names; kv_b cut into its halves, the experts of a layer stacked."""
    for ours, theirs in WHOLE.items():
        yield f"{theirs}.weight", held[f"{ours}.weight"]
    for layer in range(config["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for ours, theirs in ATTENTION.items():
            yield f"{block}{theirs}.weight", held[f"{prefix}{ours}.weight"]
        nope, width = config["qk_nope_head_dim"], config["qk_nope_head_dim"] + config["v_head_dim"]
        kv_b = held[f"{prefix}self_attn.kv_b_proj.weight"].reshape(-1, width, config["kv_lora_rank"])
        yield f"{block}attn_k_b.weight", kv_b[:, :nope].transpose(0, 2, 1)
        yield f"{block}attn_v_b.weight", kv_b[:, nope:]
        if layer < config["first_k_dense_replace"]:
            for ours, theirs in MLP.items():
                yield f"{block}{theirs}.weight", held[f"{prefix}mlp.{ours}_proj.weight"]
            continue
        yield f"{block}ffn_gate_inp.weight", as_float32(held[f"{prefix}mlp.gate.weight"])
        yield f"{block}exp_probs_b.bias", held[f"{prefix}mlp.gate.e_score_correction_bias"]
        for ours, theirs in MLP.items():
            each = range(config["n_routed_experts"])
            stack = [held[f"{prefix}mlp.experts.{expert}.{ours}_proj.weight"] for expert in each]
            yield f"{block}{theirs}_exps.weight", np.stack(stack)
            yield f"{block}{theirs}_shexp.weight", held[f"{prefix}mlp.shared_experts.{ours}_proj.weight"]


def add(writer: Any, name: str, array: Array) -> None:
    """Vectors as fp32, which llama.cpp asks for; matrices as they are stored."""
    if array.ndim == 1:
        array = as_float32(array)
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, array)


def as_float32(array: Array) -> Array:
    if array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def read_tensors(path: Path) -> dict[str, Array]:
    """Every tensor of a safetensors file; bfloat16 as the uint16 of its bits."""
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:begin].tobytes())
    kinds = {"BF16": np.uint16, "F32": np.float32}
    held: dict[str, Array] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            held[name] = raw[begin + first : begin + last].view(kinds[entry["dtype"]]).reshape(entry["shape"])
    return held


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
