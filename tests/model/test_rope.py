"""The rotary table against transformers', and its independence from what is asked for beside a position."""

from __future__ import annotations

import pytest
import torch
from generators import SHAPES, make_hf_model

from braid.model.config import ModelConfig
from braid.model.rope import RopeTable, inverse_frequencies

V3_SHAPES = [name for name in SHAPES if not name.startswith("v2")]


@pytest.mark.parametrize("shape_name", V3_SHAPES)
def test_table_is_the_oracles(shape_name: str) -> None:
    oracle, values = make_hf_model(shape_name)
    table, positions = RopeTable(ModelConfig.from_dict(values)), torch.arange(1024)
    cos, sin = oracle.model.rotary_emb(torch.zeros(1), positions[None])
    ours = table(positions)
    assert table.num_positions == 1024
    assert torch.allclose(ours[0], cos[0], atol=1e-6)
    assert torch.allclose(ours[1], sin[0], atol=1e-6)


def test_frequencies_of_deepseek_v3() -> None:
    """Fast pairs as trained, slow ones 40 times slower, a ramp between (10 of 32 pairs to 23)."""
    values = {**make_hf_model("v3")[1], "qk_rope_head_dim": 64, "max_position_embeddings": 163840}
    values["rope_parameters"] = {**values["rope_parameters"], "factor": 40.0, "original_max_position_embeddings": 4096}
    slowdown = 10000.0 ** (-torch.arange(0, 64, 2) / 64) / inverse_frequencies(ModelConfig.from_dict(values))
    assert torch.allclose(slowdown[:11], torch.ones(11), atol=1e-5)
    assert torch.allclose(slowdown[23:], torch.full((9,), 40.0), atol=1e-3)
    assert (slowdown[11:23].diff() > 0).all()


def test_a_position_has_the_same_bits_in_any_table_and_company() -> None:
    config = ModelConfig.from_dict(make_hf_model("v3")[1])
    long, short = RopeTable(config), RopeTable(config, max_positions=71)
    for positions in (torch.tensor([70]), torch.tensor([3, 70, 70, 0])):
        for ours, theirs in zip(long(positions), short(positions), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(long(torch.tensor([5, 70]))[0][1], long(torch.tensor([70]))[0][0])
