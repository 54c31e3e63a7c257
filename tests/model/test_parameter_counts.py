"""The counts against published figures and against tensors that exist."""

from pathlib import Path

import torch

from braid.model.config import ModelConfig
from braid.model.network_weights import from_state_dict
from braid.model.parameter_counts import count, count_mtp, count_parts, count_stored, tensors_of

DATA = Path(__file__).parent.parent / "data"
V3 = ModelConfig.from_path(DATA / "deepseek_v3_config.json")
KIMI_K2 = ModelConfig.from_path(DATA / "kimi_k2_config.json")


def test_deepseek_v3_as_published() -> None:
    parts = {part.name: part for part in count_parts(V3)}
    assert round(sum(part.total for part in parts.values()) / 1e9) == 671
    activated = sum(part.activated for part in parts.values())
    assert round(activated / 1e9) == 37
    # README_WEIGHTS said 36.7B with 0.9B of embedding and 0.9B of head, and was then corrected to
    # "36.6B (including 0.9B for the output Head)": a lookup does not activate a table.
    assert round(activated / 1e9, 1) == 36.6
    assert round(parts["embedding"].total / 1e9, 1) == round(parts["output head"].activated / 1e9, 1) == 0.9
    assert parts["routed experts"].activated * 32 == parts["routed experts"].total


def test_the_mtp_module_as_published() -> None:
    mtp = count_mtp(V3)
    assert round(mtp.in_layers / 1e9, 1) == 11.5
    assert mtp.unique - mtp.in_layers == 7168 * (2 * 7168 + 3)  # eh_proj and three norms, which the figure leaves out


def test_kimi_k2_as_published() -> None:
    parts = count_parts(KIMI_K2)
    assert round(sum(part.total for part in parts) / 1e12, 2) == 1.03
    activated = sum(part.activated for part in parts)
    whole_embedding = activated + 163839 * 7168
    assert activated < 32.6e9 < whole_embedding  # published: 32.6B, how it is counted is not said
    assert count_mtp(KIMI_K2).unique == 0


def test_bytes_of_one_expert() -> None:
    rows = {row.name: row for row in count_stored(V3)}
    assert rows["one expert in one layer"].bfloat16 == 2 * 3 * 7168 * 2048
    assert rows["one expert in one layer"].fp8 == 3 * 7168 * 2048 + 4 * 3 * 56 * 16
    assert round(rows["one expert in all layers"].fp8 / 1e9, 2) == 2.55
    assert rows["all routed experts"].fp8 == 256 * rows["one expert in all layers"].fp8


def test_counts_are_the_numbers_that_tensors_have() -> None:
    changes = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 4, "vocab_size": 50}
    small = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_attention_heads": 2}
    mla = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
    rest = {"model_type": "deepseek_v3", "num_experts_per_tok": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 1}
    config = ModelConfig.from_dict({**changes, **small, **mla, **rest})
    state = {name: torch.zeros(shape) for name, shape in tensors_of(config, "attention", "experts", "mtp").items()}
    from_state_dict(config, state, torch.float32)  # fails if the table lacks a tensor that the network reads
    assert sum(part.total for part in count_parts(config)) == count(tensors_of(config, "attention", "experts"))


def test_a_tied_embedding_is_counted_once_and_read_whole() -> None:
    values = {"model_type": "deepseek_v2", "tie_word_embeddings": True, "n_routed_experts": None, "q_lora_rank": None}
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    mla = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "num_attention_heads": 2}
    parts = {part.name: part for part in count_parts(ModelConfig.from_dict({**values, **sizes, **mla}))}
    assert parts["embedding"].activated == 50 * 32
    assert "output head" not in parts
    assert "routed experts" not in parts
