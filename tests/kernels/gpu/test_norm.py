"""Residual sum, RMSNorm and quantisation against float64."""

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import norm

E4M3 = torch.float8_e4m3fn


def expected_norm(total: Tensor, weight: Tensor) -> Tensor:
    wide = total.double()
    return wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6) * weight.double()


def dequantised(to: norm.Quantised) -> Tensor:
    return to.codes.double() * to.scales.t().double().repeat_interleave(128, 1)[:, : to.codes.shape[1]]


@pytest.mark.parametrize("columns", [384, 203])
def test_the_residual_sum_is_rounded_before_it_is_normed(columns: int) -> None:
    torch.manual_seed(0)
    stream = torch.full((5, columns + 8), float("nan")).bfloat16()
    stream[:, :columns] = torch.randn(5, columns)
    x, delta = stream[:, :columns], torch.randn(5, 2 * columns).bfloat16()[:, columns:]
    total = (x.double() + delta.double()).bfloat16()
    weight, out = torch.rand(columns).bfloat16(), torch.full((6, columns + 8), float("nan")).bfloat16()
    norm.add_rms_norm(x, delta, weight, 1e-6, out=out[:5, :columns])
    assert torch.equal(x, total)
    assert stream[:, columns:].isnan().all()
    torch.testing.assert_close(out[:5, :columns].double(), expected_norm(total, weight), rtol=2e-2, atol=1e-6)
    assert out[5].isnan().all()
    assert out[:, columns:].isnan().all()


@pytest.mark.parametrize("ue8m0", [False, True])
def test_the_norm_is_quantised_and_kept(ue8m0: bool) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(3, 272).bfloat16(), torch.rand(272).bfloat16()
    out, before = torch.empty_like(x), x.clone()
    codes, scales = torch.zeros(4, 272).to(E4M3), torch.full((4, 9), float("nan"))
    codes.view(torch.uint8).fill_(0x7F)  # not a number
    to = norm.add_rms_norm_quantised(x, None, weight, 1e-6, ue8m0, out, norm.Quantised(codes[:3], scales[:3, :3]))
    assert torch.equal(x, before)
    assert torch.equal(out, norm.add_rms_norm(x, None, weight, 1e-6))
    again = norm.quantise(out, ue8m0)
    assert torch.equal(again.codes.view(torch.uint8), to.codes.view(torch.uint8))
    assert torch.equal(again.scales, to.scales)
    assert codes[3].float().isnan().all()
    assert scales[3].isnan().all()
    assert scales[:, 3:].isnan().all()
    for group, values in enumerate(
        torch.split(out.double(), 128, dim=1)
    ):  # half of a code's last place, in units of the group's scale
        error = (dequantised(to)[:, group * 128 :][:, :128] - values).abs().amax(1)
        assert (error <= 16.001 * to.scales[group].double()).all(), error / to.scales[group]


def test_powers_of_two_are_exact() -> None:
    """A largest value of 448 times a power of two has that power as its scale, a hair more the next one."""
    largest = torch.tensor([448.0, 449.0, 1.75, 1.7578125, 0.0, 3.0, 448.0 * 2**20]).bfloat16()
    x = torch.zeros(7, 128).bfloat16()
    x[:, 77] = -largest
    to = norm.quantise(x, ue8m0=True)
    assert to.scales.shape == (1, 7)
    assert to.scales[0].tolist() == [1.0, 2.0 if largest[1] > 448 else 1.0, 2**-8, 2**-7, 2**-22, 2**-7, 2.0**20]
    plain = norm.quantise(x, ue8m0=False)
    assert torch.equal(plain.scales[0], largest.float().clamp(min=1e-4) / 448)
    assert plain.codes[[0, 2, 5], 77].float().tolist() == [-448.0] * 3


def test_a_row_keeps_its_bits_at_another_place() -> None:
    torch.manual_seed(2)
    rows, weight = torch.randn(9, 640).bfloat16(), torch.rand(640).bfloat16()
    whole = norm.add_rms_norm_quantised(rows.clone(), rows, weight, 1e-6, ue8m0=False)
    part = norm.add_rms_norm_quantised(rows[4:6].clone(), rows[4:6], weight, 1e-6, ue8m0=False)
    assert torch.equal(part.codes.view(torch.uint8), whole.codes[4:6].view(torch.uint8))
    assert torch.equal(part.scales, whole.scales[:, 4:6])
