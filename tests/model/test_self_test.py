"""The start-up proof passes on this machine, and catches a kernel that rounds by its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from generators import SHAPES
from small_models import small_model
from torch import Tensor

from braid.kernels.attention import DecodePlan, mla_decode
from braid.model import self_test as module
from braid.model.self_test import SelfTestError, self_test


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_this_machine_passes(shape_name: str, dtype: torch.dtype) -> None:
    self_test(small_model(shape_name).config, dtype)


def test_expert_workers_prove_their_own_kernels() -> None:
    self_test(small_model("v3").config, torch.float32, "experts")


def test_an_unpadded_product_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "linear", lambda x, weight: F.linear(x, weight))
    with pytest.raises(
        SelfTestError, match=r"linear \[\d+, \d+\] in torch\.float32 rounds a row otherwise among 1 rows"
    ):
        self_test(small_model("v3").config, torch.float32)


def test_attention_that_leans_on_its_neighbours_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaning(q: Tensor, cache_layer: Tensor, plan: DecodePlan, scale: float, lora: int) -> Tensor:
        out: Tensor = mla_decode(q, cache_layer, plan, scale, lora)
        return out + 1e-6 * len(q)

    monkeypatch.setattr(module, "mla_decode", leaning)
    with pytest.raises(SelfTestError, match="mla_decode 4 heads"):
        self_test(small_model("v3").config, torch.float32)
