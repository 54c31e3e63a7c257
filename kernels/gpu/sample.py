"""The next token of every row: the largest logit, or Gumbel-max over what min_p, top_k and top_p leave.

Noise and float64 scores are those of model/noise.py and model/sampler.py, so a GPU picks what a CPU picks from the same
logits. A row is cut into chunks of a constant length, a program each; what the chunks say is put together in ascending
order, and ties rank the lower id first: a token follows from its own logits and parameters alone (DESIGN laws 4, 5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .filters import cut
from .noise import LARGEST_GUMBEL, gumbel_of, random_bits
from .scores import highest_logit, is_drawn, ordered, scores_of

CHUNK = 4096
TILE = 1024  # of tokens that are drawn at once


class SamplingRows(NamedTuple):
    """What each row asks for, [R] each, on the device of the logits; 8 bytes wide, so that one copy can carry all."""

    temperature: Tensor  # float64; 0: greedy
    min_p: Tensor  # float64; 0: off
    top_p: Tensor  # float64; 1: off
    top_k: Tensor  # int64; 0: off
    seeds: Tensor  # int64
    positions: Tensor  # int64, absolute, of the new token


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
    return _pick(_peaks(logits), None, None)


def sample(logits: Tensor, rows: SamplingRows, has_top_k: bool, has_top_p: bool) -> Tensor:
    """logits: fp32 [R, vocab] -> int64 [R], what model/sampler.py chooses; -1 where it raises NothingToSample.

    `has_top_k`, `has_top_p`: whether any row asks for it.
    """
    peaks = _peaks(logits)
    if has_top_k and len(logits):
        cut(logits, peaks.value, peaks.edges, rows.temperature, rows.min_p, rows.top_k, False, CHUNK)
    if has_top_p and len(logits):
        cut(logits, peaks.value, peaks.edges, rows.temperature, rows.min_p, rows.top_p, True, CHUNK)
    return _pick(peaks, rows.temperature, _draw(logits, peaks, rows, has_edges=has_top_k or has_top_p))


class _Peaks(NamedTuple):
    value: Tensor  # fp32 [R, chunks], the largest logit of each
    token: Tensor  # int32 [R, chunks], the first token that has it
    edges: Tensor  # float64 [R, 3]: see filters.cut


def _peaks(logits: Tensor) -> _Peaks:
    assert logits.dtype == torch.float32, f"logits must be fp32, not {logits.dtype}"
    (rows, vocab), device = logits.shape, logits.device
    value = torch.empty(rows, triton.cdiv(vocab, CHUNK), device=device)
    peaks = _Peaks(
        value, torch.empty_like(value, dtype=torch.int32), torch.empty(rows, 3, dtype=torch.float64, device=device)
    )
    if rows:
        peak_kernel[(value.shape[1], rows)](logits, *peaks, logits.stride(0), vocab, CHUNK=CHUNK, num_warps=8)
    return peaks


def _draw(logits: Tensor, peaks: _Peaks, rows: SamplingRows, has_edges: bool) -> tuple[Tensor, Tensor]:
    """float64 and int32 [R, chunks]: the best score with noise of each chunk, and whose it is."""
    ties, tokens = torch.empty_like(peaks.token), torch.empty_like(peaks.token)
    scores = torch.empty_like(peaks.value, dtype=torch.float64)
    num_rows, num_chunks = scores.shape
    if num_rows == 0:
        return scores, tokens
    stride, vocab = logits.stride(0), logits.shape[1]
    if has_edges:
        tie_kernel[(num_chunks, num_rows)](logits, peaks.edges, ties, stride, vocab, CHUNK=CHUNK, num_warps=8)
    draw_kernel[(num_chunks, num_rows)](
        logits, peaks.value, peaks.edges, ties, scores, tokens, rows.temperature, rows.min_p, rows.seeds,
        rows.positions, stride, vocab, HAS_EDGES=has_edges, TILE=TILE, CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(num_chunks), num_warps=8,
    )  # fmt: skip
    return scores, tokens


def _pick(peaks: _Peaks, temperature: Tensor | None, drawn: tuple[Tensor, Tensor] | None) -> Tensor:
    num_rows, num_chunks = peaks.value.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=peaks.value.device)
    if num_rows:
        scores, drawn_tokens = drawn or (None, None)
        pick_kernel[(num_rows,)](
            peaks.value, peaks.token, scores, drawn_tokens, temperature, tokens, num_chunks, DRAWS=drawn is not None,
            CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1,
        )  # fmt: skip
    return tokens
