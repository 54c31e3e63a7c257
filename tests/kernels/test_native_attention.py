"""Native attention against float64 and against the torch kernels, and row by row in bits, over a cache full of NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from braid.kernels import attention, native
from braid.kernels.native_attention import mla_decode, mla_prefill

BLOCK = 64
LENGTHS = [1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1500]
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if native.available(dtype)]
# heads, d_nope, d_rope, d_v, kv_lora: the bundled model, DeepSeek-V3's per head, and odd ones
BUNDLED, V3 = (4, 32, 16, 48, 64), (8, 128, 64, 128, 512)
SIZES = [BUNDLED, V3, (1, 6, 2, 5, 9), (3, 9, 6, 13, 22), (16, 10, 6, 14, 40)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    native.set_threads(1)
    yield
    native.set_threads(1)


class Sequence:
    """A cache in which only this sequence's rows are numbers, and queries for all its positions."""

    def __init__(self, sizes: tuple[int, ...], length: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.heads, self.nope, self.rope, self.value, self.lora = sizes
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.length, self.dtype = length, dtype
        num_blocks = length // BLOCK + 4
        self.table = torch.randperm(num_blocks, generator=generator)[: length // BLOCK + 1]
        self.latents = random(length, self.lora + self.rope)
        self.cache = torch.full((num_blocks, BLOCK, self.lora + self.rope), torch.nan, dtype=dtype)
        slots = torch.repeat_interleave(self.table, BLOCK)[:length] * BLOCK + torch.arange(length) % BLOCK
        self.cache.flatten(0, 1)[slots] = self.latents
        self.kv_b = random(self.heads * (self.nope + self.value), self.lora) * self.lora**-0.5
        self.packed_kv_b = native.pack(self.kv_b)
        self.scale = (self.nope + self.rope) ** -0.5
        self.q = random(length, self.heads, self.nope + self.rope)
        self.q_absorbed = random(length, self.heads, self.lora + self.rope)

    def prefill(self, first: int, last: int) -> Tensor:
        return mla_prefill(
            self.q[first:last],
            self.cache,
            self.packed_kv_b,
            first,
            last - first,
            self.table,
            self.scale,
            self.value,
            torch.full((last - first, self.heads, self.value), torch.nan, dtype=self.dtype),
        )

    def decode(self, positions: list[int]) -> Tensor:
        tables = self.table.to(torch.int32).expand(len(positions), -1)
        out = torch.full((len(positions), self.heads, self.lora), torch.nan, dtype=self.dtype)
        q = self.q_absorbed[positions]
        return mla_decode(q, self.cache, torch.tensor(positions), tables, self.scale, self.lora, out)

    def reference_prefill(self) -> Tensor:
        plan = attention.plan_prefill(0, self.length, self.table.tolist(), BLOCK)
        return attention.mla_prefill(self.q, self.cache, self.kv_b, plan, self.scale, self.value)

    def reference_decode(self, positions: list[int]) -> Tensor:
        tables = [self.table.tolist()] * len(positions)
        plan = attention.plan_decode(positions, tables, BLOCK, self.lora + self.rope)
        return attention.mla_decode(self.q_absorbed[positions], self.cache, plan, self.scale, self.lora)

    def exact_prefill(self, positions: list[int]) -> Tensor:
        kv = (self.latents[:, : self.lora].double() @ self.kv_b.double().T).view(self.length, self.heads, -1)
        k_rope = self.latents[:, None, self.lora :].double().expand(-1, self.heads, -1)
        keys = torch.cat((kv[..., : self.nope], k_rope), dim=-1)
        return exact_attention(self.q[positions], keys, kv[..., self.nope :], positions, self.scale)

    def exact_decode(self, positions: list[int]) -> Tensor:
        keys = self.latents[:, None].double().expand(-1, self.heads, -1)
        return exact_attention(self.q_absorbed[positions], keys, keys[..., : self.lora], positions, self.scale)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, positions: list[int], scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    future = torch.arange(len(k)) > torch.tensor(positions)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def assert_as_good(native_out: Tensor, reference_out: Tensor, exact: Tensor) -> None:
    """Its error is at most a few times that of the torch kernel, and a rounding of the result."""
    error, reference_error = (native_out.double() - exact).abs().max(), (reference_out.double() - exact).abs().max()
    assert error <= 4 * reference_error + torch.finfo(native_out.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_forms_are_right(sizes: tuple[int, ...], length: int, dtype: torch.dtype) -> None:
    sequence = Sequence(sizes, length, dtype)
    positions = list(range(length))[-3:]
    assert_as_good(sequence.decode(positions), sequence.reference_decode(positions), sequence.exact_decode(positions))
    exact = sequence.exact_prefill(positions := list(range(length))[-70:])
    assert_as_good(sequence.prefill(0, length)[positions], sequence.reference_prefill()[positions], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_context_is_right(dtype: torch.dtype) -> None:
    sequence = Sequence(BUNDLED, 9000, dtype)  # past 16 splits of the shortest length
    positions = [4999, 8191, 8192, 8999]
    assert_as_good(sequence.decode(positions), sequence.reference_decode(positions), sequence.exact_decode(positions))
    sequence = Sequence(BUNDLED, 5000, dtype)
    exact = sequence.exact_prefill(positions := [2047, 2048, 4990, 4999])
    assert_as_good(sequence.prefill(0, 5000)[positions], sequence.reference_prefill()[positions], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_128_heads_are_right(dtype: torch.dtype) -> None:
    sequence = Sequence((128, 16, 8, 16, 32), 300, dtype)
    assert_as_good(sequence.decode([299]), sequence.reference_decode([299]), sequence.exact_decode([299]))
    exact = sequence.exact_prefill(positions := [0, 100, 299])
    assert_as_good(sequence.prefill(0, 300)[positions], sequence.reference_prefill()[positions], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_chunks_of_a_prompt_change_no_bits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sequence = Sequence(sizes, 530, dtype)
    whole = sequence.prefill(0, 530)
    for first, last in ((0, 1), (0, 64), (63, 65), (200, 300), (255, 257), (511, 513), (529, 530), (1, 530)):
        assert torch.equal(sequence.prefill(first, last), whole[first:last]), (first, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_a_long_prompt_change_no_bits(dtype: torch.dtype) -> None:
    sequence = Sequence(V3, 2200, dtype)  # longer than what is expanded at once
    whole = sequence.prefill(0, 2200)
    for first, last in ((0, 1000), (1000, 2200), (2047, 2049), (2190, 2200)):
        assert torch.equal(sequence.prefill(first, last), whole[first:last]), (first, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_decoded_together_keep_their_bits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sequence = Sequence(sizes, 530, dtype)
    positions = [0, 1, 63, 64, 255, 256, 257, 511, 512, 528, 529]
    alone = torch.cat([sequence.decode([position]) for position in positions])
    assert torch.equal(sequence.decode(positions), alone)
    assert torch.equal(sequence.decode(positions[::-1]).flip(0), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_knows_nothing_of_what_follows_it(dtype: torch.dtype) -> None:
    sequence = Sequence(V3, 530, dtype)
    whole = sequence.decode([528, 529])
    sequence.cache[sequence.table[8], 529 - 512] = torch.nan
    assert torch.equal(sequence.decode([528, 529])[0], whole[0])
    assert torch.equal(sequence.decode([528])[0], whole[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_threads_change_no_bits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sequence = Sequence(sizes, 1300, dtype)
    rows = [[1299], [100], [1298, 1299, 3, 700, 511, 512]]
    decoded, prefilled = [sequence.decode(positions) for positions in rows], sequence.prefill(100, 1300)
    for threads in (2, 3, 8):
        native.set_threads(threads)
        for positions, alone in zip(rows, decoded, strict=True):
            assert torch.equal(sequence.decode(positions), alone), (threads, positions)
        assert torch.equal(sequence.prefill(100, 1300), prefilled), threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sequences_decoded_together_keep_their_bits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    sequences = [Sequence(sizes, length, dtype, seed=length) for length in (5, 300, 64, 257, 1100)]
    first_blocks = torch.tensor([0, *(len(s.cache) for s in sequences)]).cumsum(0)
    cache = torch.cat([s.cache for s in sequences])
    tables = torch.full((5, 20), 10**6)  # what lies past a sequence's end names no block
    for i, sequence in enumerate(sequences):
        tables[i, : len(sequence.table)] = sequence.table + first_blocks[i]
    q = torch.stack([s.q_absorbed[-1] for s in sequences])
    lasts = torch.tensor([s.length - 1 for s in sequences])
    alone = torch.cat([s.decode([s.length - 1]) for s in sequences])
    for threads in (1, 2):
        native.set_threads(threads)
        together = mla_decode(q, cache, lasts, tables, sequences[0].scale, sequences[0].lora)
        assert torch.equal(together, alone)


def test_sequences_with_a_common_prefix_keep_their_bits() -> None:
    first, second = (Sequence(BUNDLED, 200, torch.float32, seed=seed) for seed in (1, 2))
    cache = torch.cat([first.cache, second.cache])
    tables = first.table.repeat(3, 1)
    tables[2, 1:] = second.table[1:] + len(first.cache)
    q, positions = (
        first.q_absorbed[:3],
        torch.tensor([199, 63, 199]),
    )  # the middle one is as much of the one as the other
    alone = [
        mla_decode(q[i : i + 1], cache, positions[i : i + 1], tables[i : i + 1], first.scale, first.lora)
        for i in range(3)
    ]
    assert torch.equal(mla_decode(q, cache, positions, tables, first.scale, first.lora), torch.cat(alone))
    assert not torch.equal(alone[0], alone[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_operands_change_no_bits(dtype: torch.dtype) -> None:
    sequence = Sequence(V3, 200, dtype)
    wide_q = torch.full((200, 8, 700), torch.nan, dtype=dtype)
    wide_q[..., 3:579] = sequence.q_absorbed
    wide_out = torch.full((2, 9, 600), torch.nan, dtype=dtype)
    tables = torch.stack([sequence.table, sequence.table])
    args = (sequence.cache, torch.tensor([150, 199]), tables, sequence.scale, sequence.lora)
    mla_decode(wide_q[[150, 199]][..., 3:579], *args, wide_out[:, 1:, 7:519])
    assert torch.equal(wide_out[:, 1:, 7:519], sequence.decode([150, 199]))
    assert wide_out.isnan().sum() == wide_out.numel() - 2 * 8 * 512
    wide_q[..., :192] = sequence.q
    prefill_out = torch.full((200, 9, 150), torch.nan, dtype=dtype)
    prefill_args = (sequence.cache, sequence.packed_kv_b, 0, 200, sequence.table, sequence.scale, 128)
    mla_prefill(wide_q[..., :192], *prefill_args, prefill_out[:, :8, 5:133])
    assert torch.equal(prefill_out[:, :8, 5:133], sequence.prefill(0, 200))
    assert prefill_out.isnan().sum() == prefill_out.numel() - 200 * 8 * 128


def test_scores_far_apart_do_not_overflow() -> None:
    sequence = Sequence(BUNDLED, 300, torch.float32)
    sequence.q_absorbed *= 100
    sequence.q *= 100
    assert torch.allclose(sequence.decode([299]).double(), sequence.exact_decode([299]), atol=1e-3)
    assert torch.allclose(sequence.prefill(0, 300).double(), sequence.exact_prefill(list(range(300))), atol=1e-3)


def test_no_rows_are_no_work() -> None:
    sequence = Sequence(BUNDLED, 10, torch.float32)
    assert sequence.decode([]).shape == (0, 4, 64)
    assert sequence.prefill(3, 3).shape == (0, 4, 48)


def test_what_does_not_fit_is_refused() -> None:
    sequence = Sequence(BUNDLED, 10, torch.float32)
    positions, table = torch.tensor([9]), sequence.table[None]
    with pytest.raises(AssertionError, match=r"queries torch.bfloat16, cache torch.float32"):
        mla_decode(sequence.q_absorbed[9:].bfloat16(), sequence.cache, positions, table, 1.0, 64)
    with pytest.raises(AssertionError, match="queries of 79, latents of 80"):
        mla_decode(sequence.q_absorbed[9:, :, :79], sequence.cache, positions, table, 1.0, 64)
    with pytest.raises(AssertionError, match="1 blocks, 66 positions"):
        mla_prefill(sequence.q, sequence.cache, sequence.packed_kv_b, 56, 10, sequence.table, 1.0, 48)
