"""Combine: fp32, shared expert first, then slots in their order."""

import pytest
import torch

from braid.kernels.gpu.combine import combine
from braid.kernels.reference import combine as reference


@pytest.mark.parametrize("has_shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_reference_to_the_bit(has_shared: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(5, 3, 1203).to(dtype), torch.rand(5, 3)
    shared = torch.randn(5, 1300).to(dtype)[:, 97:] if has_shared else None
    memory = torch.full((6, 1210), float("nan")).to(dtype)
    combine(shared, rows, weights, out=memory[:5, :1203])
    expected = reference(shared, rows, weights)
    assert torch.equal(memory[:5, :1203], expected)
    assert memory[5].isnan().all()
    assert memory[:, 1203:].isnan().all()
    assert torch.equal(combine(None if shared is None else shared[3:4], rows[3:4], weights[3:4])[0], expected[3])


def test_slots_are_added_in_their_order() -> None:
    rows = torch.tensor([1e8, 1.0, -1e8, 1.0]).view(1, 4, 1)
    assert combine(None, rows, torch.ones(1, 4)).item() == 1.0
    assert combine(torch.tensor([[-1e8]]), rows, torch.ones(1, 4)).item() == -1e8
