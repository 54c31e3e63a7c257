"""Latent norm, rope and the write into the paged cache against float64."""

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import latent

# rank, rope: V3's, and one of a small model that is no power of two
SIZES = [(512, 64), (40, 6)]


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """float64 rope of x [..., d]: pairs to halves."""
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    first, second, cos, sin = first.double(), second.double(), cos[..., :half].double(), sin[..., :half].double()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def angles(rows: int, rope: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(rows, rope // 2).repeat(1, 2) * 7
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_a_row_goes_into_its_slot_and_nothing_else_changes(rank: int, rope: int, interleaved: bool) -> None:
    torch.manual_seed(rank)
    projected = torch.randn(4, 24 + rank + rope).bfloat16()
    rows = projected[:, 24:]  # as the joint projection leaves them: behind the queries
    weight, (cos, sin) = torch.rand(rank).bfloat16(), angles(4, rope)
    cache = torch.full((3, 64, rank + rope), torch.nan).bfloat16()
    slots = torch.tensor([64 + 5, 191, -1, 0])
    latent.write_latents(rows, weight, 1e-6, cos, sin, slots, cache, interleaved)

    wide = rows[:, :rank].double()
    normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6) * weight.double()
    expected = torch.cat((normed, turned(rows[:, rank:], cos, sin, interleaved)), dim=-1)
    written = cache.view(-1, rank + rope)
    torch.testing.assert_close(written[slots[[0, 1, 3]]].double(), expected[[0, 1, 3]], rtol=2e-2, atol=1e-2)
    assert int(written.isnan().all(-1).sum()) == 3 * 64 - 3

    alone = torch.full_like(cache, torch.nan)
    latent.write_latents(rows[1:2], weight, 1e-6, cos[1:2], sin[1:2], slots[1:2], alone, interleaved)
    assert torch.equal(alone.view(-1, rank + rope)[191], written[191])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "rope"), [(33, 64), (3, 6)])
def test_rope_of_strided_queries_may_take_their_place(heads: int, rope: int, interleaved: bool) -> None:
    torch.manual_seed(heads)
    queries = torch.randn(3, heads, 10 + rope).bfloat16()
    before, (cos, sin) = queries.clone(), angles(3, rope)
    out = torch.full((3, heads, rope), torch.nan).bfloat16()
    latent.rope(queries[..., 10:], cos, sin, interleaved, out)
    expected = turned(before[..., 10:], cos[:, None], sin[:, None], interleaved)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)

    assert (
        latent.rope(queries[..., 10:], cos, sin, interleaved, queries[..., 10:]).data_ptr()
        == queries[..., 10:].data_ptr()
    )
    assert torch.equal(queries[..., 10:], out)
    assert torch.equal(queries[..., :10], before[..., :10])
    assert torch.equal(latent.rope(before[1:2, :, 10:], cos[1:2], sin[1:2], interleaved), out[1:2])
