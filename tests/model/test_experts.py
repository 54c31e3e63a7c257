"""Local experts answer with one row per slot, whatever order the stack is in."""

from __future__ import annotations

import pytest
import torch
from small_models import SmallModel, small_model

from braid.kernels.reference import swiglu_mlp
from braid.model.experts import LocalExperts
from braid.model.network_weights import ExpertWeights


@pytest.fixture(scope="module")
def small() -> SmallModel:
    return small_model("v3")


def test_one_row_per_slot(small: SmallModel) -> None:
    x = torch.randn(5, small.config.hidden_size)
    topk_idx = torch.tensor([[3, 0], [1, 3], [15, 2], [2, 1], [0, 15]])
    experts = LocalExperts(small.experts)
    rows = experts.collect(experts.dispatch(1, x, topk_idx))
    stack = small.experts[1]
    for token in range(5):
        for slot, expert in enumerate(topk_idx[token].tolist()):
            alone = swiglu_mlp(x[token : token + 1], stack.w13[expert], stack.w2[expert])
            assert torch.equal(rows[token, slot], alone[0])


def test_a_stack_in_another_order_gives_the_same_bits(small: SmallModel) -> None:
    x, topk_idx = torch.randn(6, small.config.hidden_size), torch.randint(16, (6, 4))
    order = torch.randperm(16)
    stack = small.experts[1]
    shuffled = ExpertWeights(stack.w13[order], stack.w2[order], tuple(order.tolist()))
    one, other = LocalExperts(small.experts), LocalExperts({1: shuffled})
    rows = one.collect(one.dispatch(1, x, topk_idx))
    assert torch.equal(other.collect(other.dispatch(1, x, topk_idx)), rows)


def test_rows_that_are_not_collected_yet_keep_their_memory(small: SmallModel) -> None:
    experts, topk_idx = LocalExperts(small.experts), torch.randint(16, (6, 4))
    inputs = [torch.randn(num, small.config.hidden_size) for num in (6, 3, 5, 6)]
    expected = []
    for x in inputs:
        expected.append(experts.collect(experts.dispatch(1, x, topk_idx[: len(x)])).clone())
    handles = [experts.dispatch(1, x, topk_idx[: len(x)]) for x in inputs]
    for handle, rows in zip(handles, expected, strict=True):
        assert torch.equal(experts.collect(handle), rows)
