"""Block fp8: every code, edge blocks, both scale formats, bitwise round trips."""

import numpy as np
import pytest
import torch
from torch import Tensor

from braid.kernels.quant import ScaleFormat, dequantise, e4m3_to_float32, quantise, scale_shape

SHAPES = [(128, 128), (256, 384), (1, 1), (130, 127), (257, 300), (64, 129)]


def decode_e4m3(code: int) -> float:
    """The format's definition: sign, 4 exponent bits with bias 7, 3 mantissa bits; all ones is not a number."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def dequantise_float64(codes: Tensor, scale: Tensor) -> np.ndarray:
    table = np.array([decode_e4m3(code) for code in range(256)])
    values = table[codes.view(torch.uint8).numpy()]
    rows, columns = np.indices(values.shape)
    return np.asarray(values * scale.double().numpy()[rows // 128, columns // 128])


def finite_codes(shape: tuple[int, int], seed: int) -> Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    return codes.view(torch.float8_e4m3fn)


def random_scale(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.rand(scale_shape(shape), generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-5


def test_every_code_decodes_as_the_format_defines() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = np.array([decode_e4m3(code) for code in range(256)], dtype=np.float32)
    got = e4m3_to_float32(codes)
    np.testing.assert_array_equal(got.numpy(), expected)
    assert torch.equal(torch.signbit(got)[:255], torch.arange(255) >= 128)  # minus zero stays minus zero


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantise_is_the_float64_product_rounded_once(shape: tuple[int, int]) -> None:
    codes, scale = finite_codes(shape, 1), random_scale(shape, 2)
    got = dequantise(codes, scale, torch.full(shape, float("nan")))
    np.testing.assert_array_equal(got.numpy(), dequantise_float64(codes, scale).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantise_to_bfloat16_rounds_the_float32_product(shape: tuple[int, int]) -> None:
    codes, scale = finite_codes(shape, 3), random_scale(shape, 4)
    got = dequantise(codes, scale, torch.full(shape, float("nan"), dtype=torch.bfloat16))
    expected = torch.from_numpy(dequantise_float64(codes, scale).astype(np.float32)).to(torch.bfloat16)
    assert torch.equal(got, expected)


def test_scales_stored_as_ue8m0_bytes_or_bfloat16_are_read() -> None:
    codes = finite_codes((200, 140), 5)
    scale = torch.tensor([[2.0**-9, 2.0**-12], [2.0**3, 2.0**-20]])
    expected = dequantise(codes, scale, torch.empty(200, 140))
    for dtype in (torch.float8_e8m0fnu, torch.bfloat16):
        assert torch.equal(dequantise(codes, scale.to(dtype), torch.empty(200, 140)), expected)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_stays_within_half_a_step(shape: tuple[int, int], scale_format: ScaleFormat) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6)) * 0.02
    codes, scale = quantise(weight, scale_format)
    error = np.abs(dequantise_float64(codes, scale) - weight.double().numpy())
    rows, columns = np.indices(shape)
    smallest_step = scale.double().numpy()[rows // 128, columns // 128] * 2.0**-9
    # 3 mantissa bits: half a step is 1/16 of the value, or half the smallest subnormal near zero.
    assert (error <= np.maximum(np.abs(weight.double().numpy()) / 16, smallest_step / 2) * (1 + 1e-6)).all()


def test_ue8m0_scales_are_powers_of_two_and_nothing_overflows() -> None:
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(7))
    weight[0, 0] = 448.0 * 2.0**-3  # exactly a power of two times 448: the scale must not be rounded up
    codes, scale = quantise(weight, "ue8m0")
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    assert scale[0, 0] == 2.0**-3
    assert not e4m3_to_float32(codes).isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_to_bfloat16_to_fp8_keeps_every_code(shape: tuple[int, int]) -> None:
    first, scale = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(8)))
    second, second_scale = quantise(dequantise(first, scale, torch.empty(shape, dtype=torch.bfloat16)))
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    torch.testing.assert_close(second_scale, scale, rtol=2.0**-8, atol=0)  # bfloat16 kept 8 bits of the largest value
    third, third_scale = quantise(dequantise(second, second_scale, torch.empty(shape, dtype=torch.bfloat16)))
    assert torch.equal(third.view(torch.uint8), second.view(torch.uint8))
    assert torch.equal(third_scale, second_scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ue8m0_round_trip_through_bfloat16_loses_nothing(shape: tuple[int, int]) -> None:
    first, scale = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(9)), "ue8m0")
    values = dequantise(first, scale, torch.empty(shape, dtype=torch.bfloat16))
    second, second_scale = quantise(values, "ue8m0")
    # A block whose largest code is 224 comes back with half the scale and twice the codes: the same numbers.
    assert torch.equal(
        dequantise(second, second_scale, torch.empty(shape)), dequantise(first, scale, torch.empty(shape))
    )
    third, third_scale = quantise(dequantise(second, second_scale, torch.empty(shape, dtype=torch.bfloat16)), "ue8m0")
    assert torch.equal(third.view(torch.uint8), second.view(torch.uint8))
    assert torch.equal(third_scale, second_scale)


def test_a_block_of_zeros_comes_back_as_zeros() -> None:
    codes, scale = quantise(torch.zeros(130, 130))
    assert torch.equal(scale, torch.ones(2, 2))
    assert torch.equal(dequantise(codes, scale, torch.full((130, 130), float("nan"))), torch.zeros(130, 130))


def test_bad_input_is_named() -> None:
    codes = finite_codes((130, 127), 10)
    with pytest.raises(ValueError, match=r"needs scales of shape \[2, 1\], got \[1, 1\]"):
        dequantise(codes, torch.ones(1, 1), torch.empty(130, 127))
    with pytest.raises(ValueError, match="not float8_e4m3fn"):
        dequantise(torch.zeros(2, 2), torch.ones(1, 1), torch.empty(2, 2))
    with pytest.raises(ValueError, match="infinite"):
        quantise(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="needs a matrix"):
        quantise(torch.zeros(3))
