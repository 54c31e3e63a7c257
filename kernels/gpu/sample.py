"""The next token of every row: the largest logit, or Gumbel-max over what min_p, top_k and top_p leave.

Noise and float64 scores are those of model/noise.py and model/sampler.py, so a GPU picks what a CPU picks from the same
logits. A row is cut into chunks of a constant length, a program each; what the chunks say is put together in ascending
order, and ties rank the lower id first: a token follows from its own logits and parameters alone (DESIGN laws 4, 5).

The least logit that top_k or top_p leaves is found by its bits, the highest five first: each step measures how many
tokens, or how much probability, every value of those five bits has. So the whole vocabulary is read 7 times a filter,
whatever is in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import LARGEST_GUMBEL, gumbel_of, random_bits

CHUNK = 4096
TILE = 1024  # of tokens that are drawn at once
DIGIT_BITS = 5
STEPS = -(-32 // DIGIT_BITS)
DIGIT_TILE = 256


class SamplingRows(NamedTuple):
    """What each row asks for, [R] each, on the device of the logits; 8 bytes wide, so that one copy can carry all."""

    temperature: Tensor  # float64; 0: greedy
    min_p: Tensor  # float64; 0: off
    top_p: Tensor  # float64; 1: off
    top_k: Tensor  # int64; 0: off
    seeds: Tensor  # int64
    positions: Tensor  # int64, absolute, of the new token


@triton.jit
def ordered(logit):
    """int64 from 1 to 2**32 - 1 that sort as the floats do; -0.0 counts as 0.0."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000


@triton.jit
def logit_of(key):
    """What `ordered` made the key of."""
    bits = (key - 0x80000000).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def highest_logit(peak_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(peak_ptr + row * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf")), 0)


@triton.jit
def is_drawn(highest, temperature):
    return (temperature > 0.0) & (highest > float("-inf")) & (highest < float("inf"))


@triton.jit
def scores_of(logit, highest, temperature, min_p):
    """float64 scores, and which tokens are in the running at all."""
    score = (logit.to(tl.float64) - highest.to(tl.float64)) / temperature
    is_in = score > float("-inf")
    if min_p > 0.0:
        is_in = is_in & (score >= tl.log(min_p))
    return score, is_in


@triton.jit
def peak_kernel(logit_ptr, peak_ptr, token_ptr, edge_ptr, stride, V, CHUNK: tl.constexpr):
    """The largest logit of a chunk (inf if one is NaN) and the first token that has it; no edge to begin with."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logit_ptr + row * stride + column, mask=column < V, other=float("-inf"))
    logit = tl.where(logit == logit, logit, float("inf"))
    where = row * tl.num_programs(0) + chunk
    tl.store(peak_ptr + where, tl.max(logit, 0))
    tl.store(token_ptr + where, chunk * CHUNK + tl.argmax(logit, 0))
    if chunk == 0:
        tl.store(edge_ptr + row * 3 + tl.arange(0, 4), tl.zeros((4,), tl.float64), mask=tl.arange(0, 4) < 3)


@triton.jit
def next_digit(
    state_ptr, bins_ptr, edge_ptr, row, step, num_rows, num_chunks, highest, temperature, top_p,
    WEIGHS: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """What the bins of a step say: (key so far, measure of all above it, wanted measure, measure of what has this key).

    The digit is the largest one with which the wanted measure is reached; the lowest if none is.
    """
    state = state_ptr + (step * num_rows + row) * 3
    key, above, wanted = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    BINS: tl.constexpr = 1 << BITS
    chunk = tl.arange(0, CHUNKS)[:, None]
    digit = tl.arange(0, BINS)
    where = (row * num_chunks + chunk) * BINS + digit[None, :]
    bins = tl.sum(tl.load(bins_ptr + where, mask=chunk < num_chunks, other=0.0), 0)
    if WEIGHS:
        if step == 0:
            edge = tl.load(edge_ptr + row * 3)
            mass = tl.exp((logit_of(edge.to(tl.int64)).to(tl.float64) - highest.to(tl.float64)) / temperature)
            excess = tl.load(edge_ptr + row * 3 + 2)  # ties that top_k has dropped
            wanted = top_p * (tl.sum(bins, 0) - tl.where(excess > 0.0, excess * mass, 0.0))
    from_here = tl.sum(tl.where(digit[None, :] >= digit[:, None], bins[None, :], 0.0), 1)
    chosen = tl.max(tl.where(above + from_here >= wanted, digit, 0), 0)
    above += tl.sum(tl.where(digit > chosen, bins, 0.0), 0)
    key += (chosen.to(tl.int64) << tl.maximum(32 - BITS * (step + 1), 0)).to(tl.float64)
    return key, above, wanted, tl.sum(tl.where(digit == chosen, bins, 0.0), 0)


@triton.jit
def is_asked(asked, highest, temperature, WEIGHS: tl.constexpr):
    """Whether a row's top_p (WEIGHS) or top_k leaves anything out."""
    if WEIGHS:
        return is_drawn(highest, temperature) & (asked < 1.0)
    return is_drawn(highest, temperature) & (asked > 0)


@triton.jit(do_not_specialize=["step"])
def digit_kernel(
    logit_ptr, peak_ptr, edge_ptr, state_ptr, bins_before_ptr, bins_ptr, temperature_ptr, min_p_ptr, filter_ptr, step,
    stride, V,
    WEIGHS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Measures each value of the next digit among the chunk's tokens whose key begins with what is known of it.

    filter: top_k, which counts tokens, or (WEIGHS) top_p, which adds exp(score). state: float64 [steps, R, 3].
    """
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    num_rows = tl.num_programs(1)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    asked = tl.load(filter_ptr + row)
    highest = highest_logit(peak_ptr, row, num_chunks, CHUNKS)
    if is_asked(asked, highest, temperature, WEIGHS):
        wanted = asked.to(tl.float64)
        key = tl.full((), 0.0, tl.float64)
        above = tl.full((), 0.0, tl.float64)
        if step > 0:
            key, above, wanted, _ = next_digit(
                state_ptr, bins_before_ptr, edge_ptr, row, step - 1, num_rows, num_chunks, highest, temperature, asked,
                WEIGHS, BITS, CHUNKS,
            )  # fmt: skip
        if chunk == 0:
            state = state_ptr + (step * num_rows + row) * 3
            tl.store(state, key)
            tl.store(state + 1, above)
            tl.store(state + 2, wanted)
        min_p = tl.load(min_p_ptr + row)
        first_key = key.to(tl.int64)
        least = tl.maximum(first_key, tl.load(edge_ptr + row * 3).to(tl.int64))
        known = (32 - BITS * step).to(tl.int64)  # bits that are not known yet
        shift = tl.maximum(known - BITS, 0)
        BINS: tl.constexpr = 1 << BITS
        digit = tl.arange(0, BINS)
        sums = tl.zeros((BINS, TILE), tl.float64)
        for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, V), TILE):
            column = start + tl.arange(0, TILE)
            logit = tl.load(logit_ptr + row * stride + column, mask=column < V, other=float("-inf"))
            own = ordered(logit)
            fits = (own >= least) & (((own - first_key) >> known) == 0) & (logit > float("-inf"))
            if tl.max(fits.to(tl.int32), 0) > 0:
                score, is_in = scores_of(logit, highest, temperature, min_p)
                if WEIGHS:
                    measure = tl.exp(score)
                else:
                    measure = tl.full((TILE,), 1.0, tl.float64)
                own_digit = tl.where(fits & is_in, (own - first_key) >> shift, -1)
                sums += tl.where(own_digit[None, :] == digit[:, None], measure[None, :], 0.0)
        tl.store(bins_ptr + (row * num_chunks + chunk) * BINS + digit, tl.sum(sums, 1))


@triton.jit
def edge_kernel(
    peak_ptr, edge_ptr, state_ptr, bins_ptr, temperature_ptr, filter_ptr, last_step, num_chunks,
    WEIGHS: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Where a search ends: the row's least key, how many of the tokens that have it are kept, how many are not."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    asked = tl.load(filter_ptr + row)
    highest = highest_logit(peak_ptr, row, num_chunks, CHUNKS)
    edge = edge_ptr + row * 3
    if is_asked(asked, highest, temperature, WEIGHS):
        key, above, wanted, own = next_digit(
            state_ptr, bins_ptr, edge_ptr, row, last_step, tl.num_programs(0), num_chunks, highest, temperature, asked,
            WEIGHS, BITS, CHUNKS,
        )  # fmt: skip
        if WEIGHS:
            before, ties = tl.load(edge), tl.load(edge + 1)
            mass = tl.exp((logit_of(key.to(tl.int64)).to(tl.float64) - highest.to(tl.float64)) / temperature)
            needed = tl.where(mass > 0.0, (wanted - above) / tl.where(mass > 0.0, mass, 1.0), 1e300)
            needed = tl.maximum(tl.ceil(needed), 1.0)
            tl.store(edge, tl.maximum(key, before))
            tl.store(edge + 1, tl.where(key > before, needed, tl.where(key == before, tl.minimum(ties, needed), ties)))
        else:
            ties = tl.minimum(wanted - above, own)
            tl.store(edge, key)
            tl.store(edge + 1, ties)
            tl.store(edge + 2, own - ties)


@triton.jit
def tie_kernel(logit_ptr, edge_ptr, tie_ptr, stride, V, CHUNK: tl.constexpr):
    """Tokens of a chunk that stand at the edge."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logit_ptr + row * stride + column, mask=column < V, other=float("-inf"))
    at_edge = (ordered(logit) == tl.load(edge_ptr + row * 3).to(tl.int64)) & (column < V)
    tl.store(tie_ptr + row * tl.num_programs(0) + chunk, tl.sum(at_edge.to(tl.int32), 0))


@triton.jit
def draw_kernel(
    logit_ptr, peak_ptr, edge_ptr, tie_ptr, score_ptr, token_ptr, temperature_ptr, min_p_ptr, seed_ptr, position_ptr,
    stride, V,
    HAS_EDGES: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The best score plus noise of a chunk's tokens; of those at the edge, the first ones by id."""
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    highest = highest_logit(peak_ptr, row, num_chunks, CHUNKS)
    if is_drawn(highest, temperature):
        min_p = tl.load(min_p_ptr + row)
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row)
        best = tl.full((), float("-inf"), tl.float64)
        token = tl.full((), 0, tl.int32)
        if HAS_EDGES:
            edge = tl.load(edge_ptr + row * 3).to(tl.int64)
            ties = tl.load(edge_ptr + row * 3 + 1)
            every = tl.arange(0, CHUNKS)
            seen = tl.sum(tl.load(tie_ptr + row * num_chunks + every, mask=every < chunk, other=0), 0)
        for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, V), TILE):
            column = start + tl.arange(0, TILE)
            logit = tl.load(logit_ptr + row * stride + column, mask=column < V, other=float("-inf"))
            score, is_in = scores_of(logit, highest, temperature, min_p)
            if HAS_EDGES:
                key = ordered(logit)
                at_edge = (key == edge).to(tl.int32)
                rank = seen + tl.cumsum(at_edge, 0)
                is_in = is_in & ((key > edge) | ((at_edge > 0) & (rank.to(tl.float64) <= ties)))
                seen += tl.sum(at_edge, 0)
            is_in = is_in & (score + LARGEST_GUMBEL >= best)
            if tl.max(is_in.to(tl.int32), 0) > 0:
                drawn = score + gumbel_of(random_bits(seed, position, start, TILE))
                drawn = tl.where(is_in, drawn, float("-inf"))
                largest = tl.max(drawn, 0)
                if largest > best:  # strictly: the first of equals stays
                    token = start + tl.argmax(drawn, 0)
                    best = largest
        tl.store(score_ptr + row * num_chunks + chunk, best)
        tl.store(token_ptr + row * num_chunks + chunk, token)


@triton.jit
def pick_kernel(
    peak_ptr, peak_token_ptr, score_ptr, token_ptr, temperature_ptr, out_ptr, num_chunks,
    DRAWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The first chunk that has the best of all, of those drawn or of the logits; -1 where no logit is the largest."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    where = row * num_chunks + chunk
    peak = tl.load(peak_ptr + where, mask=chunk < num_chunks, other=float("-inf"))
    highest = tl.max(peak, 0)
    best = tl.argmax(peak, 0)
    tokens = tl.load(peak_token_ptr + where, mask=chunk < num_chunks, other=0)
    if DRAWS:
        if is_drawn(highest, tl.load(temperature_ptr + row)):
            best = tl.argmax(tl.load(score_ptr + where, mask=chunk < num_chunks, other=float("-inf")), 0)
            tokens = tl.load(token_ptr + where, mask=chunk < num_chunks, other=0)
    token = tl.sum(tl.where(chunk == best, tokens, 0), 0)
    is_good = (highest > float("-inf")) & (highest < float("inf"))
    tl.store(out_ptr + row, tl.where(is_good, token, -1).to(tl.int64))


def greedy(logits: Tensor) -> Tensor:
    """logits: fp32 [R, vocab] -> int64 [R], the lowest id among equal maxima; -1 where one is NaN or the largest is
    infinite."""
    return _pick(_Chunks.of(logits), None, None)


def sample(logits: Tensor, rows: SamplingRows, has_top_k: bool, has_top_p: bool) -> Tensor:
    """logits: fp32 [R, vocab] -> int64 [R], what model/sampler.py chooses; -1 where it raises NothingToSample.

    `has_top_k`, `has_top_p`: whether any row asks for it.
    """
    chunks = _Chunks.of(logits)
    if has_top_k:
        _cut(chunks, rows, rows.top_k, weighs=False)
    if has_top_p:
        _cut(chunks, rows, rows.top_p, weighs=True)
    return _pick(chunks, rows.temperature, _draw(chunks, rows, has_edges=has_top_k or has_top_p))


class _Chunks(NamedTuple):
    logits: Tensor
    num_rows: int
    count: int  # a row's chunks
    padded: int
    peaks: Tensor  # fp32 [R, chunks], the largest logit of each
    tokens: Tensor  # int32 [R, chunks], the first token that has it
    edges: Tensor  # float64 [R, 3]: the least key that is left, how many tokens of that key are left, how many are not

    @classmethod
    def of(cls, logits: Tensor) -> _Chunks:
        assert logits.dtype == torch.float32, f"logits must be fp32, not {logits.dtype}"
        (rows, vocab), device = logits.shape, logits.device
        count = triton.cdiv(vocab, CHUNK)
        peaks, tokens = (
            torch.empty(rows, count, device=device),
            torch.empty(rows, count, dtype=torch.int32, device=device),
        )
        edges = torch.empty(rows, 3, dtype=torch.float64, device=device)
        if rows:
            peak_kernel[(count, rows)](logits, peaks, tokens, edges, logits.stride(0), vocab, CHUNK=CHUNK, num_warps=8)
        return cls(logits, rows, count, triton.next_power_of_2(count), peaks, tokens, edges)


def _cut(chunks: _Chunks, rows: SamplingRows, asked: Tensor, weighs: bool) -> None:
    """Moves the rows' edges up to where top_k or top_p has them."""
    device, num_bins = chunks.logits.device, 1 << DIGIT_BITS
    state = torch.empty(STEPS, chunks.num_rows, 3, dtype=torch.float64, device=device)
    bins = torch.empty(2, chunks.num_rows, chunks.count, num_bins, dtype=torch.float64, device=device)
    search = {"WEIGHS": weighs, "BITS": DIGIT_BITS, "CHUNKS": chunks.padded}
    if chunks.num_rows == 0:
        return
    for step in range(STEPS):
        digit_kernel[(chunks.count, chunks.num_rows)](
            chunks.logits, chunks.peaks, chunks.edges, state, bins[1 - step % 2], bins[step % 2], rows.temperature,
            rows.min_p, asked, step, chunks.logits.stride(0), chunks.logits.shape[1], TILE=DIGIT_TILE, CHUNK=CHUNK,
            num_warps=8, **search,
        )  # fmt: skip
    edge_kernel[(chunks.num_rows,)](
        chunks.peaks, chunks.edges, state, bins[(STEPS - 1) % 2], rows.temperature, asked, STEPS - 1, chunks.count,
        num_warps=4, **search,
    )  # fmt: skip


def _draw(chunks: _Chunks, rows: SamplingRows, has_edges: bool) -> tuple[Tensor, Tensor]:
    """float64 and int32 [R, chunks]: the best score with noise of each chunk, and whose it is."""
    ties, drawn = torch.empty_like(chunks.tokens), torch.empty_like(chunks.tokens)
    scores = torch.empty(chunks.peaks.shape, dtype=torch.float64, device=chunks.peaks.device)
    if chunks.num_rows == 0:
        return scores, drawn
    grid, (stride, vocab) = (chunks.count, chunks.num_rows), (chunks.logits.stride(0), chunks.logits.shape[1])
    if has_edges:
        tie_kernel[grid](chunks.logits, chunks.edges, ties, stride, vocab, CHUNK=CHUNK, num_warps=8)
    draw_kernel[grid](
        chunks.logits, chunks.peaks, chunks.edges, ties, scores, drawn, rows.temperature, rows.min_p, rows.seeds,
        rows.positions, stride, vocab, HAS_EDGES=has_edges, TILE=TILE, CHUNK=CHUNK, CHUNKS=chunks.padded, num_warps=8,
    )  # fmt: skip
    return scores, drawn


def _pick(chunks: _Chunks, temperature: Tensor | None, drawn: tuple[Tensor, Tensor] | None) -> Tensor:
    tokens = torch.empty(chunks.num_rows, dtype=torch.int64, device=chunks.logits.device)
    if chunks.num_rows:
        scores, drawn_tokens = drawn or (None, None)
        pick_kernel[(chunks.num_rows,)](
            chunks.peaks, chunks.tokens, scores, drawn_tokens, temperature, tokens, chunks.count,
            DRAWS=drawn is not None, CHUNKS=chunks.padded, num_warps=1,
        )  # fmt: skip
    return tokens
