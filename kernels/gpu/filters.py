"""What top_k and top_p leave of a row: the least logit's key, and how many of the tokens that tie with it.

The key is found from its highest bits down, five at a time: each step measures how many tokens, or how much
probability, every value of those bits has. So a filter reads the vocabulary seven times, whatever is in it. A row is
cut into chunks of a constant length, a program each, and what they measure is added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scores import highest_logit, is_drawn, logit_of, ordered, scores_of

DIGIT_BITS = 5
TILE = 256  # of tokens that are measured at once


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


def cut(
    logits: Tensor, peaks: Tensor, edges: Tensor, temperature: Tensor, min_p: Tensor, asked: Tensor, weighs: bool,
    chunk: int,
) -> None:  # fmt: skip
    """Moves the rows' edges up to where `asked`, their top_k or (weighs) top_p, has them; top_k comes first.

    logits: fp32 [R, vocab]; peaks: fp32 [R, chunks], the largest of each `chunk`; edges: float64 [R, 3]: the least key,
    how many tokens of that key are left and how many are not, 0 to begin with; temperature, min_p: float64 [R].
    """
    rows, num_chunks = peaks.shape
    num_steps = triton.cdiv(32, DIGIT_BITS)
    state = torch.empty(num_steps, rows, 3, dtype=torch.float64, device=logits.device)
    bins = torch.empty(2, rows, num_chunks, 1 << DIGIT_BITS, dtype=torch.float64, device=logits.device)
    search = {"WEIGHS": weighs, "BITS": DIGIT_BITS, "CHUNKS": triton.next_power_of_2(num_chunks)}
    for step in range(num_steps):
        digit_kernel[(num_chunks, rows)](
            logits, peaks, edges, state, bins[1 - step % 2], bins[step % 2], temperature, min_p, asked, step,
            logits.stride(0), logits.shape[1], TILE=TILE, CHUNK=chunk, num_warps=8, **search,
        )  # fmt: skip
    edge_kernel[(rows,)](
        peaks, edges, state, bins[(num_steps - 1) % 2], temperature, asked, num_steps - 1, num_chunks, num_warps=4,
        **search,
    )  # fmt: skip
