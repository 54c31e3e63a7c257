"""The kernels against float64, and row by row in bits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from braid.kernels.reference import (
    apply_rope,
    batched_matmul,
    combine,
    grouped_mlp,
    linear,
    packed,
    rms_norm,
    silu,
    swiglu,
    swiglu_mlp,
)
from braid.router.gate import route

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# inputs, outputs: the last ones are odd, tiny, or leave a row at no multiple of 16 bytes
SHAPES = [(64, 48), (40, 96), (256, 512), (130, 8), (257, 9), (66, 70), (24, 8), (2, 3)]
ROW_COUNTS = [*range(1, 14), 17, 31, 33, 65]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_rows_keep_their_bits(x: Tensor, weight: Tensor, row_counts: list[int]) -> None:
    whole = linear(x, weight)
    for count in row_counts:
        for first in (0, 1, 2, len(x) - count):
            part = x[first : first + count]
            same = linear(part, weight)
            assert torch.equal(same, whole[first : first + count]), f"{count} rows from {first}"
            assert torch.equal(linear(part.clone(), weight), same), f"{count} rows from {first}, moved"


@DTYPES
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_linear_rows_keep_their_bits(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = random(70, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    assert_rows_keep_their_bits(x, weight, ROW_COUNTS)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 56), (72, 72), (20, 320)])
def test_linear_rows_keep_their_bits_with_two_threads(inputs: int, outputs: int) -> None:
    """Threads cut 5 to 11 rows into fours and a rest that rounds otherwise, unless rows are padded to fours."""
    x, weight = random(70, inputs), random(outputs, inputs, seed=1)
    assert_rows_keep_their_bits(x, weight, [1, 3, 5, 6, 7, 9, 10, 11])
    assert_rows_keep_their_bits(x, packed(weight), [1, 3, 5, 6, 7, 9, 10, 11])
    assert torch.equal(linear(x, packed(weight)), linear(x, weight))


@DTYPES
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_packed_matrix_gives_the_same_bits(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = random(600, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    bias, prepared = random(outputs, dtype=dtype, seed=2), packed(weight)
    assert torch.equal(linear(x, prepared, bias), linear(x, weight, bias))
    assert_rows_keep_their_bits(x[:70], prepared, ROW_COUNTS)


def test_linear_rows_keep_their_bits_past_one_tile() -> None:
    x, weight = random(1100, 40), random(24, 40, seed=1)
    whole = linear(x, weight)
    for first, last in ((0, 512), (511, 513), (1000, 1100), (1, 700)):
        assert torch.equal(linear(x[first:last], weight), whole[first:last])


def test_linear_does_not_see_where_a_weight_lies() -> None:
    x, weight = random(9, 40), random(24, 40, seed=1)
    buffer = torch.empty(24 * 40 + 1)
    unaligned = buffer[1:].view(24, 40).copy_(weight)
    assert torch.equal(linear(x, unaligned), linear(x, weight))


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 3, 600])
def test_linear_is_right(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(rows, 33, dtype=dtype), random(7, 33, dtype=dtype, seed=1), random(7, dtype=dtype, seed=2)
    expected = x.double() @ weight.double().T + bias.double()
    out = linear(x, weight, bias)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)


@DTYPES
@pytest.mark.parametrize(("depth", "outputs"), [(16, 40), (10, 22), (40, 12), (22, 3), (256, 5)])
def test_batched_matmul_keeps_bits_for_any_rows_and_batch(depth: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = random(9, 20, depth, dtype=dtype), random(9, depth, outputs, dtype=dtype, seed=1)
    whole = batched_matmul(x, weight)
    assert torch.allclose(whole.double(), x.double() @ weight.double(), rtol=1e-2, atol=1e-1)
    for batches, rows in itertools.product((1, 2, 3, 8), (1, 2, 4, 5, 7, 19)):
        picked = torch.tensor([8, 1, 5, 3, 2, 7, 0, 4][:batches])
        assert torch.equal(batched_matmul(x[picked, 1 : 1 + rows], weight[picked]), whole[picked, 1 : 1 + rows])


@pytest.mark.parametrize("size", [1, 7, 40, 66, 256, 1000])
@DTYPES
def test_elementwise_kernels_keep_bits_wherever_an_element_stands(size: int, dtype: torch.dtype) -> None:
    x, weight = 4 * random(37, 2 * size, dtype=dtype), random(2 * size, dtype=dtype, seed=1)
    normed, activated = rms_norm(x, weight, 1e-6), swiglu(x)
    for row in range(0, 37, 5):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], normed[row])
        assert torch.equal(swiglu(x[row : row + 1])[0], activated[row])
    flat = x.float().flatten()
    whole = silu(flat)
    assert all(torch.equal(silu(flat[i : i + 1]), whole[i : i + 1]) for i in range(0, len(flat), 3))


def test_rms_norm_and_silu_are_right() -> None:
    x, weight = 3 * random(5, 40), random(40, seed=1)
    wide = x.double()
    expected = weight.double() * wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)
    assert torch.allclose(rms_norm(x, weight, 1e-6).double(), expected, atol=1e-5)
    assert torch.allclose(silu(x), F.silu(x), atol=1e-6)
    assert torch.equal(silu(torch.tensor([-200.0, 200.0])), torch.tensor([0.0, 200.0]))


def naive_pair(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate, up = (w13.double() @ x.double()).chunk(2)
    return w2.double() @ (gate * torch.sigmoid(gate) * up)


def test_grouped_mlp_gives_each_pair_its_row_in_the_given_order() -> None:
    x, w13, w2 = random(6, 20), random(5, 24, 20, seed=1), random(5, 20, 12, seed=2)
    row_of_pair, expert_of_pair = torch.tensor([5, 0, 0, 3, 5, 1, 2]), torch.tensor([4, 1, 4, 1, 0, 4, 1])
    out = grouped_mlp(x, row_of_pair, expert_of_pair, w13, w2)
    for pair, (row, expert) in enumerate(zip(row_of_pair.tolist(), expert_of_pair.tolist(), strict=True)):
        assert torch.allclose(out[pair].double(), naive_pair(x[row], w13[expert], w2[expert]), atol=1e-4)
    none = torch.tensor([], dtype=torch.int64)
    assert grouped_mlp(x, none, none, w13, w2).shape == (0, 20)


@DTYPES
def test_grouped_mlp_pairs_keep_their_bits_in_any_company(dtype: torch.dtype) -> None:
    x, w13, w2 = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(30, 64), (4, 96, 64), (4, 64, 48)]))
    rows, experts = torch.arange(30), torch.arange(30) * 3 % 4
    whole = grouped_mlp(x, rows, experts, w13, w2)
    for picked in (torch.tensor([7]), torch.tensor([29, 0, 8]), torch.arange(29, -1, -1), torch.arange(0, 30, 4)):
        assert torch.equal(grouped_mlp(x, rows[picked], experts[picked], w13, w2), whole[picked])
        alone = grouped_mlp(x[picked], torch.arange(len(picked)), experts[picked], w13, w2)
        assert torch.equal(alone, whole[picked])
    prepared = [tuple(packed(matrix) for matrix in stack) for stack in (w13, w2)]
    assert torch.equal(grouped_mlp(x, rows, experts, *prepared), whole)


@DTYPES
def test_combine_adds_the_slots_in_order_to_the_shared_row(dtype: torch.dtype) -> None:
    shared, rows, weights = random(5, 8, dtype=dtype), random(5, 3, 8, dtype=dtype, seed=1), random(5, 3, seed=2)
    expected = shared.float()
    for slot in range(3):
        expected = expected + weights[:, slot : slot + 1] * rows[:, slot].float()
    assert torch.equal(combine(shared, rows, weights), expected.to(dtype))
    assert torch.equal(combine(None, rows, weights), combine(torch.zeros_like(shared), rows, weights))


@pytest.mark.parametrize("interleaved", [True, False])
def test_apply_rope_turns_pairs(interleaved: bool) -> None:
    x, angles = random(4, 3, 8), random(4, 4, seed=1)
    cos, sin = (torch.cat((t, t), dim=-1)[:, None] for t in (angles.cos(), angles.sin()))
    turned = apply_rope(x, cos, sin, interleaved)
    pairs = x.view(4, 3, 4, 2) if interleaved else torch.stack((x[..., :4], x[..., 4:]), dim=-1)
    expected = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(4, 1, 4), angles[:, None])
    assert torch.allclose(turned, torch.cat((expected.real, expected.imag), dim=-1), atol=1e-6)


def test_gradients_flow_and_inputs_stay() -> None:
    x, w13, w2, norm = (random(*s).requires_grad_() for s in [(3, 8), (2, 12, 8), (2, 8, 6), (8,)])
    gate = random(2, 8, seed=3).requires_grad_()
    before = [t.detach().clone() for t in (x, w13, w2, norm, gate)]
    normed = rms_norm(x, norm, 1e-6)
    idx, weights = route(linear(normed, gate), None, "sigmoid", "noaux_tc", 2, 1, 1, True, 2.5)
    rows = grouped_mlp(normed, torch.arange(3).repeat_interleave(2), idx.flatten(), w13, w2).view(3, 2, 8)
    out = combine(swiglu_mlp(normed, w13[0], w2[0]), rows, weights)
    apply_rope(out, torch.ones(8), torch.ones(8)).square().sum().backward()  # type: ignore[no-untyped-call]
    for tensor, old in zip((x, w13, w2, norm, gate), before, strict=True):
        assert torch.equal(tensor, old)
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
