"""Latent norm, rope and the write into the paged cache against float64."""

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import attention_decode, attention_prefill, latent

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


def test_rows_and_keys_beyond_two_to_the_31_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of 4.3 GB, of which only the pages that are used come to be: so it is not filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.manual_seed(4)
    rank, rope, position = 512, 64, 70
    num_blocks = (1 << 31) // (64 * (rank + rope)) + 3
    cache = torch.empty(num_blocks, 64, rank + rope, dtype=torch.bfloat16)
    blocks = torch.tensor([num_blocks - 1, num_blocks - 2])
    assert int(blocks.min()) * 64 * (rank + rope) > 1 << 31
    rows, weight, (cos, sin) = torch.randn(1, rank + rope).bfloat16(), torch.ones(rank).bfloat16(), angles(1, rope)
    for block in blocks.tolist():
        cache[block].normal_()
    slot = blocks[-1:] * 64 + position % 64
    latent.write_latents(rows, weight, 1e-6, cos, sin, slot, cache, True)
    expected = torch.zeros(1, 1, rank + rope).bfloat16()
    latent.write_latents(rows, weight, 1e-6, cos, sin, torch.tensor([0]), expected, True)
    assert torch.equal(cache.view(-1, rank + rope)[slot], expected[0])

    near, tables = cache[blocks], (blocks[None], torch.tensor([[0, 1]]))
    q = torch.randn(1, 2, rank + rope).bfloat16()
    far_and_near = [
        attention_decode.mla_decode(
            q, kept, attention_decode.plan_decode(torch.tensor([position]), table, 64, 2), 0.1, rank
        )
        for kept, table in zip((cache, near), tables, strict=True)
    ]
    assert torch.equal(*far_and_near)
    gathered = attention_prefill.gather_latents(cache, blocks, position + 1)
    assert torch.equal(gathered, near.flatten(0, 1)[: position + 1])
