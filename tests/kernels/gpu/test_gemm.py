"""Dense products against float64; a row keeps its bits whatever its neighbours, its tile and the split of work."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import gemm, heads, splits
from braid.kernels.gpu.norm import Quantised, quantise


def block_weight(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    scales = torch.rand(-(-outputs // 128), -(-inputs // 128)) + 0.5
    return torch.randn(outputs, inputs).to(torch.float8_e4m3fn), scales


def wide(x: Quantised) -> Tensor:
    return x.codes.double() * x.scales.t().double().repeat_interleave(128, 1)[:, : x.codes.shape[1]]


def wide_weight(codes: Tensor, scales: Tensor) -> Tensor:
    spread = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes.double() * spread[: codes.shape[0], : codes.shape[1]]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 0.004) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 144, 200), (17, 384, 64), (130, 256, 72)])
def test_fp8_agrees_and_writes_its_rows_only(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x = quantise(torch.randn(rows, inputs).bfloat16(), ue8m0=False)
    weight, scales = block_weight(outputs, inputs)
    bias = torch.randn(outputs).bfloat16()
    memory = torch.full((rows + 1, outputs + 8), float("nan")).bfloat16()
    gemm.linear_fp8(x, weight, scales, bias, out=memory[:rows, :outputs])
    assert_near(memory[:rows, :outputs], wide(x) @ wide_weight(weight, scales).T + bias.double())
    assert memory[rows].isnan().all()
    assert memory[:, outputs:].isnan().all()


def test_fp8_of_an_odd_depth_is_refused() -> None:
    x = Quantised(torch.zeros(2, 72).to(torch.float8_e4m3fn), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"72 columns.*keep this matrix in bfloat16"):
        gemm.linear_fp8(x, torch.zeros(64, 72).to(torch.float8_e4m3fn), torch.ones(1, 1))


@pytest.mark.parametrize("outputs", [64, 200])
def test_fp8_rows_keep_their_bits(outputs: int) -> None:
    """By the number of rows, by their place, and by side-by-side or one-after-the-other parts of the sum."""
    torch.manual_seed(1)
    rows = torch.randn(150, 2048).bfloat16()
    weight, scales = block_weight(outputs, 2048)
    together = gemm.linear_fp8(quantise(rows, ue8m0=False), weight, scales)
    for first, last in ((0, 1), (7, 40), (140, 150)):
        alone = gemm.linear_fp8(quantise(rows[first:last], ue8m0=False), weight, scales)
        assert torch.equal(alone, together[first:last])


def test_fp8_parts_are_added_alike_in_both_kernels() -> None:
    torch.manual_seed(2)
    x = quantise(torch.randn(129, 2176).bfloat16(), ue8m0=True)
    weight, scales = block_weight(136, 2176)
    tiling = gemm.fp8_tiling(x, weight)
    assert (tiling.parts, tiling.part_steps, tiling.is_large) == (2, 9, False)
    few = gemm.linear_fp8(x, weight, scales)
    many = torch.full((129, 136), float("nan")).bfloat16()
    gemm.run_fp8(x, weight, scales, None, many, replace(tiling, outputs=128, programs=1))
    assert torch.equal(many, few)
    assert_near(few, wide(x) @ wide_weight(weight, scales).T)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(5, 203, 70), (33, 64, 130), (129, 1040, 24)])
def test_bf16_agrees_in_any_size_and_dtype(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, inputs + 9).bfloat16()[:, 3 : 3 + inputs]
    weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    expected = x.double() @ weight.double().T + bias.double()
    memory = torch.full((rows + 1, outputs + 8), float("nan"))
    gemm.linear_bf16(x, weight, bias, out=memory[:rows, :outputs])
    assert_near(memory[:rows, :outputs], expected, 1e-5)
    assert memory[rows].isnan().all()
    assert memory[:, outputs:].isnan().all()
    assert_near(gemm.linear_bf16(x, weight, bias), expected)


def test_bf16_rows_keep_their_bits() -> None:
    torch.manual_seed(1)
    rows, weight = torch.randn(140, 1056).bfloat16(), torch.randn(72, 1056).bfloat16()
    together = gemm.linear_bf16(rows, weight)
    tiling = gemm.bf16_tiling(rows, weight)
    assert tiling.programs == 2
    for first, last in ((0, 1), (11, 50)):
        assert torch.equal(gemm.linear_bf16(rows[first:last], weight), together[first:last])
    apart = torch.randn(20, 1063).bfloat16()[:, 7:].copy_(rows[:20])
    assert gemm.bf16_tiling(apart, weight).tokens == 16  # cannot be read 16 bytes at a time
    assert torch.equal(gemm.linear_bf16(apart, weight), together[:20])
    many = torch.full((140, 72), float("nan")).bfloat16()
    gemm.run_bf16(rows, weight, None, many, replace(tiling, outputs=128, programs=1))
    assert torch.equal(many, together)


def test_token_tiles_go_in_groups_and_none_is_left_out() -> None:
    torch.manual_seed(3)
    num_rows = 17 * 128 + 1  # a group of 16 token tiles, and one of 2
    x = Quantised(torch.randn(num_rows, 128).to(torch.float8_e4m3fn), torch.rand(1, num_rows))
    weight, scales = block_weight(136, 128)
    out = torch.full((num_rows, 136), float("nan")).bfloat16()
    gemm.run_fp8(x, weight, scales, None, out, splits.Tiling(128, 128, parts=1, part_steps=1, programs=1))
    assert_near(out, wide(x) @ wide_weight(weight, scales).T)


def test_no_rows_are_no_launch() -> None:
    weight, scales = block_weight(64, 128)
    assert gemm.linear_bf16(torch.zeros(0, 128).bfloat16(), torch.zeros(64, 128).bfloat16()).shape == (0, 64)
    assert gemm.linear_fp8(quantise(torch.zeros(0, 128).bfloat16(), ue8m0=False), weight, scales).shape == (0, 64)


@pytest.mark.parametrize(("outputs", "inputs"), [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (384, 384)])
def test_the_parts_of_a_sum_follow_from_the_weight_alone(outputs: int, inputs: int) -> None:
    steps = -(-inputs // 128)
    tilings = [splits.tiling_of(rows, outputs, steps) for rows in (1, 16, 64, 100, 128, 129, 1000, 4096)]
    assert len({(tiling.parts, tiling.part_steps) for tiling in tilings}) == 1
    assert all(tiling.programs in (1, tiling.parts) for tiling in tilings)
    parts, part_steps = tilings[0].parts, tilings[0].part_steps
    assert (parts - 1) * part_steps < steps <= parts * part_steps
    assert parts == {2112: 4, 4096: 2}.get(outputs, 1)


@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(72, 136), (64, 144)])  # of any width, and of wide reads
def test_heads_of_any_strides(inputs: int, outputs: int, is_view: bool) -> None:
    torch.manual_seed(0)
    num_heads, rows = 3, 20
    x = torch.randn(rows, num_heads, inputs + 16).bfloat16()[:, :, 16:]
    weights = torch.randn(num_heads, outputs, inputs).bfloat16()
    if is_view:
        weights = torch.randn(num_heads, inputs + 8, outputs).bfloat16()[:, 8:].transpose(1, 2)
    memory = torch.full((rows, num_heads + 1, outputs + 8), float("nan")).bfloat16()
    heads.head_linear(x, weights, out=memory[:, :num_heads, :outputs])
    expected = torch.einsum("mhk,hnk->mhn", x.double(), weights.double())
    assert_near(memory[:, :num_heads, :outputs], expected)
    assert memory[:, num_heads].isnan().all()
    assert memory[:, :, outputs:].isnan().all()
    assert torch.equal(heads.head_linear(x[2:3], weights)[0], memory[2, :num_heads, :outputs])
