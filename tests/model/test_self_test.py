"""The start-up proof passes on this machine, and catches a kernel that rounds by its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from generators import SHAPES
from small_models import small_model
from torch import Tensor

from braid.kernels.attention import DecodePlan
from braid.model.families import ops_for
from braid.model.self_test import SelfTestError, self_test
from braid.model.torch_ops import TorchOps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_this_machine_passes(shape_name: str, dtype: torch.dtype) -> None:
    self_test(small_model(shape_name).config, dtype, TorchOps(is_packing=True))
    self_test(small_model(shape_name).config, dtype, ops_for(dtype))


def test_expert_workers_prove_their_own_kernels() -> None:
    self_test(small_model("v3").config, torch.float32, TorchOps(is_packing=True), "experts")


class Unpadded(TorchOps):
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """A row alone is summed up in halves, which is what some BLAS libraries do on some CPUs."""
        if len(x) > 1:
            return F.linear(x, weight)
        half = x.shape[1] // 2
        return F.linear(x[:, :half], weight[:, :half]) + F.linear(x[:, half:], weight[:, half:])


class Leaning(TorchOps):
    def mla_decode(
        self,
        q: Tensor,
        cache_layer: Tensor,
        plan: DecodePlan,
        softmax_scale: float,
        kv_lora_rank: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return TorchOps.mla_decode(self, q, cache_layer, plan, softmax_scale, kv_lora_rank) + 1e-6 * len(q)


def test_an_unpadded_product_is_caught() -> None:
    with pytest.raises(
        SelfTestError, match=r"linear \[\d+, \d+\] in torch\.float32 rounds a row otherwise among 1 rows"
    ):
        self_test(small_model("v3").config, torch.float32, Unpadded())


def test_attention_that_leans_on_its_neighbours_is_caught() -> None:
    with pytest.raises(SelfTestError, match="mla_decode 4 heads"):
        self_test(small_model("v3").config, torch.float32, Leaning())
