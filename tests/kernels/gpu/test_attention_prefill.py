"""MLA prefill against float64, and a prompt in chunks or pieces against the whole, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import attention_prefill
from braid.kernels.gpu.attention_prefill import gather_latents, mla_prefill, plan_prefill

BLOCK = 64
SCALE = 0.15


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one tile."""
    monkeypatch.setattr(attention_prefill, "PIECE", 128)


@dataclass(frozen=True)
class Sizes:
    heads: int
    nope: int
    rope: int
    value: int
    rank: int


# keys and values by descriptor, and sizes that are no powers of two
TILED = Sizes(2, 32, 16, 64, 64)
ODD = Sizes(2, 20, 8, 48, 40)


class Prompt:
    """Its latents lie in shuffled blocks; every other row of the cache is NaN."""

    def __init__(self, sizes: Sizes, length: int) -> None:
        self.sizes, self.length = sizes, length
        dim, width = sizes.rank + sizes.rope, -(-length // BLOCK)
        blocks = torch.randperm(width + 2)
        self.table = blocks[:width]
        self.latents = torch.randn(length, dim).bfloat16()
        self.cache = torch.full((width + 2, BLOCK, dim), torch.nan).bfloat16()
        for position, latent in enumerate(self.latents):
            self.cache[self.table[position // BLOCK], position % BLOCK] = latent
        self.kv_b = torch.randn(sizes.heads * (sizes.nope + sizes.value), sizes.rank) / sizes.rank**0.5
        self.q = torch.randn(length, sizes.heads, sizes.nope + sizes.rope).bfloat16()

    def expand(self, latents: Tensor) -> Tensor:
        """Row by row, so that a row's bits are its own."""
        expanded: Tensor = (latents.float()[:, None] * self.kv_b).sum(-1).bfloat16()
        return expanded

    def attend(self, start: int, end: int) -> Tensor:
        out = torch.full((end - start, self.sizes.heads, self.sizes.value), torch.nan).bfloat16()
        plan = plan_prefill(start, end - start, self.table)
        sizes = self.sizes
        return mla_prefill(self.q[start:end], self.cache, self.expand, plan, SCALE, sizes.rank, sizes.value, out)

    def expected(self) -> Tensor:
        sizes = self.sizes
        kv = self.expand(self.latents[:, : sizes.rank]).view(self.length, sizes.heads, -1).double()
        rope = self.latents[:, None, sizes.rank :].double().expand(-1, sizes.heads, -1)
        keys = torch.cat((kv[..., : sizes.nope], rope), dim=-1)
        scores = torch.einsum("qhd,khd->hqk", self.q.double(), keys) * SCALE
        scores = scores.masked_fill(torch.ones(self.length, self.length).triu(1).bool(), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), kv[..., sizes.nope :])


@pytest.mark.parametrize("sizes", [TILED, ODD])
def test_every_query_sees_the_keys_up_to_its_own(sizes: Sizes) -> None:
    torch.manual_seed(sizes.rank)
    prompt = Prompt(sizes, 150)
    torch.testing.assert_close(prompt.attend(0, 150).double(), prompt.expected(), rtol=2e-2, atol=1e-2)


def test_sizes_of_v3() -> None:
    torch.manual_seed(5)
    prompt = Prompt(Sizes(1, 128, 64, 128, 64), 130)
    torch.testing.assert_close(prompt.attend(0, 130).double(), prompt.expected(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sizes", [TILED, ODD])
def test_chunks_and_pieces_have_no_part_in_the_bits(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(sizes.rank)
    prompt = Prompt(sizes, 300)
    whole = prompt.attend(0, 300)
    start = 0
    for end in (50, 128, 129, 260, 300):  # within a tile, at a piece's end, one row, across pieces
        assert torch.equal(prompt.attend(start, end), whole[start:end]), (start, end)
        start = end
    monkeypatch.setattr(attention_prefill, "PIECE", 4096)
    assert torch.equal(prompt.attend(0, 300), whole)


def test_latents_are_gathered_up_to_the_last_position() -> None:
    prompt = Prompt(ODD, 130)
    assert torch.equal(gather_latents(prompt.cache, prompt.table, 130), prompt.latents)
    assert torch.equal(gather_latents(prompt.cache, prompt.table, 64), prompt.latents[:64])
