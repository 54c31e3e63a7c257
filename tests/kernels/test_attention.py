"""Both attention forms against plain float64 softmax, and row by row in bits, over a cache full of NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from braid.kernels import attention
from braid.kernels.attention import KV_SPLIT, mla_decode, mla_prefill, plan_decode, plan_prefill

BLOCK = 64
SCALE = 0.3
LENGTHS = [1, 63, 64, 65, 255, 256, 257, 600]
# heads, d_nope, d_rope, d_v, kv_lora
SIZES = [(4, 16, 8, 12, 40), (1, 6, 2, 5, 9), (3, 10, 6, 14, 22), (6, 8, 4, 8, 16)]


class Sequence:
    """A cache in which only this sequence's rows are numbers, and queries for all its positions."""

    def __init__(self, sizes: tuple[int, ...], length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.heads, self.nope, self.rope, self.value, self.lora = sizes
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.length = length
        self.table = torch.randperm(14, generator=generator).tolist()[: length // BLOCK + 1]
        self.latents = random(length, self.lora + self.rope)
        self.cache = torch.full((14, BLOCK, self.lora + self.rope), torch.nan, dtype=dtype)
        for position in range(length):
            self.cache[self.table[position // BLOCK], position % BLOCK] = self.latents[position]
        self.kv_b = random(self.heads * (self.nope + self.value), self.lora) * self.lora**-0.5
        self.q = random(length, self.heads, self.nope + self.rope)
        self.q_absorbed = random(length, self.heads, self.lora + self.rope)

    def prefill(self, first: int, last: int) -> Tensor:
        plan = plan_prefill(first, last - first, self.table, BLOCK)
        out: Tensor = mla_prefill(self.q[first:last], self.cache, self.kv_b, plan, SCALE, self.value)
        return out

    def decode(self, positions: list[int]) -> Tensor:
        plan = plan_decode(positions, [self.table] * len(positions), BLOCK, self.lora + self.rope)
        out: Tensor = mla_decode(self.q_absorbed[positions], self.cache, plan, SCALE, self.lora)
        return out

    def exact_prefill(self) -> Tensor:
        kv = (self.latents[:, : self.lora].double() @ self.kv_b.double().T).view(self.length, self.heads, -1)
        k_rope = self.latents[:, None, self.lora :].double().expand(-1, self.heads, -1)
        keys = torch.cat((kv[..., : self.nope], k_rope), dim=-1)
        return exact_attention(self.q.double(), keys, kv[..., self.nope :])

    def exact_decode(self) -> Tensor:
        keys = self.latents[:, None].double().expand(-1, self.heads, -1)
        return exact_attention(self.q_absorbed.double(), keys, keys[..., : self.lora])


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_forms_are_right(sizes: tuple[int, ...], length: int) -> None:
    sequence = Sequence(sizes, length)
    assert torch.allclose(sequence.prefill(0, length).double(), sequence.exact_prefill(), atol=1e-4)
    positions = list(range(length))[-70:]
    assert torch.allclose(sequence.decode(positions).double(), sequence.exact_decode()[positions], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_chunks_of_a_prompt_change_no_bits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sequence = Sequence(sizes, 530, dtype)
    whole = sequence.prefill(0, 530)
    for first, last in ((0, 1), (0, 64), (63, 65), (200, 300), (255, 257), (511, 513), (529, 530), (1, 530)):
        assert torch.equal(sequence.prefill(first, last), whole[first:last]), (first, last)


def test_a_long_prompt_in_groups_of_queries_keeps_its_bits() -> None:
    sequence = Sequence(SIZES[0], 800)
    whole = sequence.prefill(0, 800)
    assert torch.equal(torch.cat([sequence.prefill(0, 300), sequence.prefill(300, 800)]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_rows_decoded_together_keep_their_bits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sequence = Sequence(sizes, 530, dtype)
    positions = [0, 1, 63, 64, 255, 256, 257, 511, 512, 529]
    alone = torch.cat([sequence.decode([position]) for position in positions])
    assert torch.equal(sequence.decode(positions), alone)
    assert torch.equal(sequence.decode(positions[::-1]).flip(0), alone)


def test_sequences_decoded_together_keep_their_bits() -> None:
    sequences = [Sequence(SIZES[0], length, seed=length) for length in (5, 300, 64, 257)]
    cache = torch.cat([s.cache for s in sequences])
    tables = [[block + 14 * i for block in s.table] for i, s in enumerate(sequences)]
    plan = plan_decode([s.length - 1 for s in sequences], tables, BLOCK, cache.shape[-1])
    q = torch.stack([s.q_absorbed[-1] for s in sequences])
    together = mla_decode(q, cache, plan, SCALE, sequences[0].lora)
    assert torch.equal(together, torch.cat([s.decode([s.length - 1]) for s in sequences]))


def test_bounded_gathers_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, positions = Sequence(SIZES[0], 300), list(range(250, 300))
    whole = sequence.decode(positions)
    monkeypatch.setattr(attention, "GATHER_FLOATS", 7 * KV_SPLIT * sequence.cache.shape[-1])
    assert torch.equal(sequence.decode(positions), whole)


def test_blocks_that_do_not_reach_are_refused() -> None:
    with pytest.raises(AssertionError, match="1 blocks do not reach position 64"):
        plan_decode([64], [[3]], BLOCK, 48)
