"""Every tensor of a checkpoint ends up in the network, and the table of names is the checkpoint's own."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from generators import SHAPES, make_hf_model
from small_models import SmallModel, small_model
from torch import Tensor

from braid.model.config import ModelConfig
from braid.model.network_weights import from_state_dict
from braid.model.tensor_names import expected_tensors, expert_tensors, mtp_copies, optional_tensors


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [t for field in fields(value) for t in tensors_in(getattr(value, field.name))]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("shape_name", SHAPES)
def test_names_and_shapes_are_those_that_transformers_writes(shape_name: str) -> None:
    small = small_model(shape_name)
    assert expected_tensors(small.config) == {name: tuple(t.shape) for name, t in small.state.items()}


@pytest.mark.parametrize("shape_name", SHAPES)
def test_every_number_of_the_checkpoint_is_loaded(shape_name: str) -> None:
    """Once, but for kv_b_proj: each form of attention has it in a layout of its own."""
    small = small_model(shape_name)
    held = {id(t): t for t in tensors_in(small.weights)}
    experts = [t for stack in small.experts.values() for t in tensors_in(stack)]
    count = sum(t.numel() for t in [*held.values(), *experts])
    twice = [t for name, t in small.state.items() if "kv_b_proj" in name]
    assert count == sum(t.numel() for t in [*small.state.values(), *twice]) + num_zero_biases(small)


def num_zero_biases(small: SmallModel) -> int:
    """A full-rank query projection has no bias; its rows of the joined projection get zeros."""
    config = small.config
    if not config.attention_bias or config.q_lora_rank is not None:
        return 0
    return int(config.num_hidden_layers * config.num_attention_heads * config.qk_head_dim)


def test_roles_share_nothing_and_leave_nothing_out() -> None:
    config = ModelConfig.from_dict(make_hf_model("v3", num_mtp_layers=1)[1])
    roles = [expected_tensors(config, (role,)) for role in ("attention", "experts", "mtp")]
    assert sum(map(len, roles)) == len(expected_tensors(config))
    assert len(expert_tensors(config, 0)) == 0
    assert len(expert_tensors(config, 1, (3, 4))) == 6
    assert optional_tensors(config) == frozenset(roles[2])
    assert mtp_copies(config) < optional_tensors(config)


def test_mtp_is_built_where_the_checkpoint_has_it() -> None:
    """transformers says num_nextn_predict_layers = 1 for models that have none."""
    small = small_model("v3")
    config = ModelConfig.from_dict(make_hf_model("v3", num_mtp_layers=1)[1])
    assert from_state_dict(config, small.state, torch.float32)[0].mtp == ()
    shapes = expected_tensors(config, ["mtp"])
    lean = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in mtp_copies(config)}
    weights, experts = from_state_dict(config, {**small.state, **lean}, torch.float32)
    assert weights.mtp[0].embed_tokens is weights.embed_tokens
    assert weights.mtp[0].shared_head is weights.lm_head
    assert sorted(experts) == [1, 2, 3]


def test_the_gate_stays_in_fp32() -> None:
    layer = small_model("v3", torch.bfloat16).weights.layers[1]
    assert layer.gate_weight is not None
    assert layer.e_score_correction_bias is not None
    assert (layer.gate_weight.dtype, layer.e_score_correction_bias.dtype) == (torch.float32, torch.float32)
    assert layer.o_proj.dtype == torch.bfloat16
