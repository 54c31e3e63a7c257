"""Residual sum, RMSNorm and quantisation against float64."""

import torch

from braid.kernels.gpu import norm


def test_the_residual_sum_is_rounded_before_it_is_normed() -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(5, 384).bfloat16(), torch.randn(5, 384).bfloat16(), torch.rand(384).bfloat16()
    stream = x.clone()
    normed = norm.add_rms_norm(stream, delta, weight, 1e-6)
    total = (x.double() + delta.double()).bfloat16()
    assert torch.equal(stream, total)
    wide = total.double()
    expected = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6) * weight.double()
    torch.testing.assert_close(normed.double(), expected, rtol=2e-2, atol=1e-6)
