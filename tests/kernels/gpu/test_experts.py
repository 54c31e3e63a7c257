"""Experts, the shared expert and dense layers against float64; rows keep their bits whatever the tile."""

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import mlp
from braid.kernels.gpu.experts import grouped_mlp_fp8
from braid.kernels.gpu.experts_bf16 import grouped_mlp_bf16
from braid.kernels.gpu.index import dispatch_index
from braid.kernels.gpu.norm import Quantised, quantise

E = 4
LOADS = {
    "mixed": [2, 0, -1, 2, 2, 1, 0, 2] * 3,  # nobody asks for expert 3
    "one expert has all": [1] * 35,
}


def block_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[.., N, K] -> e4m3 and a scale for each block of 128 x 128."""
    outputs, inputs = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight, (0, -inputs % 128, 0, -outputs % 128))
    shape = *padded.shape[:-2], padded.shape[-2] // 128, 128, padded.shape[-1] // 128, 128
    blocks = padded.view(shape)
    scales = blocks.abs().amax((-1, -3)) / 448
    codes = (blocks / scales[..., None, :, None]).flatten(-2).flatten(-3, -2)[..., :outputs, :inputs]
    return codes.contiguous().to(torch.float8_e4m3fn), scales


def wide_weight(codes: Tensor, scales: Tensor) -> Tensor:
    spread = scales.double().repeat_interleave(128, -2).repeat_interleave(128, -1)
    return codes.double() * spread[..., : codes.shape[-2], : codes.shape[-1]]


def wide(x: Quantised) -> Tensor:
    return x.codes.double() * x.scales.t().double().repeat_interleave(128, 1)[:, : x.codes.shape[1]]


def expected_row(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate, up = (x @ w13.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ w2.T


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("sizes", [(72, 40), (80, 70)])
def test_bf16_experts_of_any_size(load: str, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    hidden, inner = sizes
    x = torch.randn(6, hidden + 8).bfloat16()[:, :hidden]
    w13 = (torch.randn(E, 2 * inner, hidden) * hidden**-0.5).bfloat16()
    w2 = (torch.randn(E, hidden, inner) * inner**-0.5).bfloat16()
    chosen = torch.tensor(LOADS[load])
    row_of_pair = torch.randint(6, chosen.shape)
    outs = []
    for tile in (16, 64):
        memory = torch.full((len(chosen), hidden + 8), float("nan")).bfloat16()
        outs.append(grouped_mlp_bf16(x, row_of_pair, dispatch_index(chosen, E, tile), w13, w2, memory[:, :hidden]))
        assert memory[chosen < 0].isnan().all()
        assert memory[:, hidden:].isnan().all()
    ours = (chosen >= 0).nonzero().flatten()
    assert torch.equal(outs[0][ours], outs[1][ours])
    for pair in ours.tolist():
        expert, row = int(chosen[pair]), x[row_of_pair[pair]].double()
        assert_near(outs[0][pair], expected_row(row, w13[expert].double(), w2[expert].double()), 0.01)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_experts(load: str, ue8m0: bool) -> None:
    torch.manual_seed(0)
    hidden, inner = 272, 128
    x = quantise(torch.randn(6, hidden).bfloat16(), ue8m0)
    w13, w13_scale = block_fp8(torch.randn(E, 2 * inner, hidden) * hidden**-0.5)
    w2, w2_scale = block_fp8(torch.randn(E, hidden, inner) * inner**-0.5)
    chosen = torch.tensor(LOADS[load])
    row_of_pair = torch.randint(6, chosen.shape)
    outs = []
    for tile in (16, 64):
        memory = torch.full((len(chosen), hidden + 8), float("nan")).bfloat16()
        found = dispatch_index(chosen, E, tile)
        outs.append(grouped_mlp_fp8(x, row_of_pair, found, w13, w13_scale, w2, w2_scale, ue8m0, memory[:, :hidden]))
        assert memory[chosen < 0].isnan().all()
        assert memory[:, hidden:].isnan().all()
    ours = (chosen >= 0).nonzero().flatten()
    assert torch.equal(outs[0][ours], outs[1][ours])
    for pair in ours.tolist():
        expert, row = int(chosen[pair]), wide(x)[row_of_pair[pair]]
        first, second = wide_weight(w13[expert], w13_scale[expert]), wide_weight(w2[expert], w2_scale[expert])
        assert_near(outs[0][pair], expected_row(row, first, second), 0.05)


def test_a_pair_keeps_its_bits_in_another_batch() -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 256).bfloat16()
    w13, w13_scale = block_fp8(torch.randn(E, 256, 256) / 16)
    w2, w2_scale = block_fp8(torch.randn(E, 256, 128) / 12)

    def outputs(rows: Tensor, chosen: Tensor) -> Tensor:
        out = torch.full((len(chosen), 256), float("nan")).bfloat16()
        row_of_pair, found = torch.arange(len(chosen)), dispatch_index(chosen, E)
        return grouped_mlp_fp8(
            quantise(rows, ue8m0=False), row_of_pair, found, w13, w13_scale, w2, w2_scale, False, out
        )

    chosen = torch.randint(E, (40,))
    whole = outputs(x, chosen)
    assert torch.equal(outputs(x[17:19], chosen[17:19]), whole[17:19])
    order = torch.randperm(40)
    assert torch.equal(outputs(x[order], chosen[order]), whole[order])


def test_experts_that_fp8_does_not_fit_are_refused() -> None:
    x, chosen = quantise(torch.zeros(1, 128).bfloat16(), ue8m0=False), torch.zeros(1, dtype=torch.int64)
    w13, w13_scale = block_fp8(torch.ones(1, 128, 128))
    w2, w2_scale = block_fp8(torch.ones(1, 128, 64))
    with pytest.raises(ValueError, match=r"64 inner columns.*keep these experts in bfloat16"):
        grouped_mlp_fp8(x, chosen, dispatch_index(chosen, 1), w13, w13_scale, w2, w2_scale, False, torch.zeros(1, 128))


@pytest.mark.parametrize("hidden", [144, 1024])  # without and with a sum over K in parts
def test_dense_mlps(hidden: int) -> None:
    torch.manual_seed(0)
    rows, inner = 5, 272
    x = torch.randn(rows, hidden).bfloat16()
    w13, w2 = torch.randn(2 * inner, hidden) * hidden**-0.5, torch.randn(hidden, inner) * inner**-0.5
    memory = torch.full((rows + 1, hidden + 8), float("nan")).bfloat16()
    mlp.swiglu_mlp_bf16(x, w13.bfloat16(), w2.bfloat16(), out=memory[:rows, :hidden])
    assert_near(memory[:rows, :hidden], expected_row(x.double(), w13.bfloat16().double(), w2.bfloat16().double()), 0.01)
    assert memory[rows].isnan().all()
    assert memory[:, hidden:].isnan().all()

    codes, (w13_codes, w13_scale), (w2_codes, w2_scale) = quantise(x, ue8m0=False), block_fp8(w13), block_fp8(w2)
    out = mlp.swiglu_mlp_fp8(codes, w13_codes, w13_scale, w2_codes, w2_scale, ue8m0=False)
    first, second = wide_weight(w13_codes, w13_scale), wide_weight(w2_codes, w2_scale)
    assert_near(out, expected_row(wide(codes), first, second), 0.05)
    alone = mlp.swiglu_mlp_fp8(quantise(x[2:3], ue8m0=False), w13_codes, w13_scale, w2_codes, w2_scale, ue8m0=False)
    assert torch.equal(alone[0], out[2])
