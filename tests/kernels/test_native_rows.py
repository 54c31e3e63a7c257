"""The native row-wise steps against the torch reference and the gate, and row by row in bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from braid.kernels import native, reference
from braid.kernels.native_rows import add_rms_norm, combine, gather, rms_norm, rope, route, write_latents
from braid.router import gate

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if native.available(dtype)]
WIDTHS = [1, 15, 16, 17, 31, 32, 33, 256, 1000, 1024, 7168]
EPS = 1e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    native.set_threads(1)
    yield
    native.set_threads(1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def angles(num_rows: int, size: int) -> tuple[Tensor, Tensor]:
    half = random(num_rows, size // 2, seed=9)
    return torch.cat((half.cos(), half.cos()), dim=-1), torch.cat((half.sin(), half.sin()), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_are_right(width: int, dtype: torch.dtype) -> None:
    x, delta, weight = (random(5, width, dtype=dtype, seed=i) for i in range(3))
    weight = weight[0]
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()
    out = rms_norm(x, weight, EPS, poisoned(5, width, dtype=dtype))
    assert torch.allclose(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    total = x + delta
    normed = add_rms_norm(x, delta, weight, EPS, poisoned(5, width, dtype=dtype))
    assert torch.equal(x, total)
    assert torch.equal(normed, rms_norm(total, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_looked_up(dtype: torch.dtype) -> None:
    table, rows = random(9, 40, dtype=dtype), torch.tensor([8, 0, 3, 3])
    assert torch.equal(gather(table, rows, poisoned(4, 40, dtype=dtype)), table[rows])
    out = poisoned(4, 50, dtype=dtype)  # rows of a wider matrix, both ways
    assert torch.equal(gather(table[:, 5:15], rows, out[:, 7:17]), table[rows, 5:15])
    assert out.isnan().sum() == 4 * 40
    for beyond in (9, -1):
        with pytest.raises(IndexError, match=f"row {beyond} of a table of 9"):
            gather(table, torch.tensor([0, beyond]), poisoned(2, 40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("size", [2, 6, 16, 34, 64, 128])
def test_rope_is_that_of_the_reference(size: int, interleaved: bool, dtype: torch.dtype) -> None:
    wide = random(7, 3, size + 5, dtype=dtype)
    x, (cos, sin) = wide[..., 5:], angles(7, size)
    expected = reference.apply_rope(x, cos[:, None], sin[:, None], interleaved)
    assert torch.equal(rope(x, cos, sin, interleaved, poisoned(7, 3, size, dtype=dtype)), expected)
    rest = wide[..., :5].clone()
    rope(x, cos, sin, interleaved, out=x)
    assert torch.equal(x, expected)
    assert torch.equal(wide[..., :5], rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_lora", "d_rope"), [(512, 64), (64, 16), (23, 6)])
def test_latents_are_written_where_they_belong(kv_lora: int, d_rope: int, dtype: torch.dtype) -> None:
    latent, weight = random(7, kv_lora + d_rope + 3, dtype=dtype)[:, : kv_lora + d_rope], random(kv_lora, dtype=dtype)
    cache = poisoned(3, 64, kv_lora + d_rope, dtype=dtype)
    slots = torch.tensor([5, 191, 0, 64, 63, 100, 7])
    cos, sin = angles(7, d_rope)
    write_latents(latent, weight, EPS, cos, sin, slots, cache, interleaved=True)
    written = cache.flatten(0, 1)[slots]
    assert torch.equal(written[:, :kv_lora], rms_norm(latent[:, :kv_lora], weight, EPS))
    assert torch.equal(written[:, kv_lora:], reference.apply_rope(latent[:, kv_lora:], cos, sin))
    assert cache.isnan().sum() == (192 - 7) * (kv_lora + d_rope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_slots", [1, 2, 6, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_combine_is_that_of_the_reference(width: int, num_slots: int, dtype: torch.dtype) -> None:
    shared, rows = random(5, width, dtype=dtype), random(5, num_slots, width, dtype=dtype, seed=1)
    weights = random(5, num_slots, seed=2)
    out = combine(shared, rows, weights, poisoned(5, width, dtype=dtype))
    assert torch.equal(out, reference.combine(shared, rows, weights))
    assert torch.equal(combine(None, rows, weights), reference.combine(None, rows, weights))
    by_slot = rows.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(combine(shared, by_slot, weights), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_and_threads_change_no_bits(dtype: torch.dtype) -> None:
    x, weight = random(300, 1000, dtype=dtype), random(1000, dtype=dtype)
    rows, weights = random(300, 6, 1000, dtype=dtype), random(300, 6)
    logits, bias = random(300, 64), random(64)
    cos, sin = angles(300, 64)
    heads = x[:, :960].view(300, 15, 64)

    def all_of(at: slice) -> list[Tensor]:
        idx, expert_weights = route(logits[at], bias, "sigmoid", "noaux_tc", 6, 8, 4, True, 2.5)
        turned = rope(heads[at], cos[at], sin[at], interleaved=True)
        return [rms_norm(x[at], weight, EPS), turned, combine(x[at], rows[at], weights[at]), idx, expert_weights]

    alone = [torch.cat(parts) for parts in zip(*(all_of(slice(i, i + 1)) for i in range(300)), strict=True)]
    for threads in (1, 2, 5):
        native.set_threads(threads)
        for together, expected in zip(all_of(slice(None)), alone, strict=True):
            assert torch.equal(together, expected), threads
        for together, expected in zip(all_of(slice(7, 250)), alone, strict=True):
            assert torch.equal(together, expected[7:250]), threads


Scoring = Literal["sigmoid", "softmax"]
Method = Literal["noaux_tc", "group_limited_greedy", "greedy"]


@st.composite
def gates(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Scoring, Method, int, int, int, bool, float]:
    """Logits and biases on a coarse grid, so that ties abound: between experts, and between groups."""
    n_group, group_size = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    num_experts, topk_group = n_group * group_size, draw(st.integers(1, n_group))
    grid = draw(st.sampled_from([1, 2, 8, 64]))
    seed = draw(st.integers(0, 10**6))
    logits = (random(draw(st.integers(1, 5)), num_experts, seed=seed) * 2 * grid).round() / grid
    bias = (random(num_experts, seed=seed + 1) * grid).round() / grid if draw(st.booleans()) else None
    scoring: Scoring = draw(st.sampled_from(["sigmoid", "softmax"]))
    method: Method = draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]))
    top_k = draw(st.integers(1, num_experts))  # more than the kept groups hold, too
    return logits, bias, scoring, method, top_k, n_group, topk_group, draw(st.booleans()), 2.5


@settings(deadline=None, max_examples=400)
@given(gates())
def test_experts_are_those_of_the_gate(
    case: tuple[Tensor, Tensor | None, Scoring, Method, int, int, int, bool, float],
) -> None:
    topk_idx, topk_weights = route(*case)
    expected_idx, expected_weights = gate.route(*case)
    assert torch.equal(topk_idx, expected_idx)
    assert torch.allclose(topk_weights, expected_weights, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("num_experts", "n_group", "topk_group", "top_k"), [(256, 8, 4, 8), (64, 8, 4, 6), (24, 4, 2, 4)]
)
def test_experts_of_random_logits_are_those_of_the_gate(
    num_experts: int, n_group: int, topk_group: int, top_k: int, scoring: Scoring
) -> None:
    logits, bias = random(2000, num_experts) * 3, random(num_experts, seed=1) * 0.1
    topk_idx, topk_weights = route(logits, bias, scoring, "noaux_tc", top_k, n_group, topk_group, True, 2.5)
    expected = gate.route(logits, bias, scoring, "noaux_tc", top_k, n_group, topk_group, True, 2.5)
    assert torch.equal(topk_idx, expected[0])
    assert torch.allclose(topk_weights, expected[1], rtol=1e-6)


def test_scores_are_exact_to_an_ulp() -> None:
    logits = torch.cat((random(20000) * 20, torch.tensor([-torch.inf, torch.inf, 0.0, -90.0, -104.0, 90.0, 1e-30])))
    scores = route(logits[:, None], None, "sigmoid", "greedy", 1, 1, 1, False, 1.0)[1][:, 0]
    exact = 1.0 / (1.0 + torch.exp(-logits.double()))
    assert torch.allclose(scores.double(), exact, rtol=1.5 * 2**-23, atol=2**-126)


def test_a_nan_chooses_experts_that_exist() -> None:
    logits = torch.full((2, 16), torch.nan)
    logits[1, 3:] = 1.0
    topk_idx, _ = route(logits, None, "sigmoid", "noaux_tc", 4, 4, 2, True, 1.0)
    assert all(len(set(row)) == 4 and set(row) <= set(range(16)) for row in topk_idx.tolist())


def test_no_rows_are_no_work() -> None:
    empty = torch.empty(0, 16)
    assert rms_norm(empty, torch.ones(16), EPS).shape == (0, 16)
    assert combine(None, empty.view(0, 4, 16), torch.empty(0, 4)).shape == (0, 16)
    assert route(empty, None, "sigmoid", "greedy", 4, 1, 1, True, 1.0)[0].shape == (0, 4)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"rows torch.float32, weight torch.bfloat16"):
        rms_norm(random(2, 16), random(16, dtype=torch.bfloat16), EPS)
    with pytest.raises(AssertionError, match=r"gate logits must be fp32, not torch.bfloat16"):
        route(random(2, 16, dtype=torch.bfloat16), None, "sigmoid", "greedy", 4, 1, 1, True, 1.0)
