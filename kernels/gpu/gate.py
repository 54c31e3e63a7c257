"""The gate: logits in fp32, then the experts of a token as router/gate.py chooses them; one program a token."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 8  # parts of the hidden size that are summed on their own and added in order, by one program or by several
EXPERTS = 64
FEW_TOKENS, MANY_TOKENS = 16, 64  # on wgmma's N, where every tile gives the same bits
ENOUGH_PROGRAMS = 64  # from here on a program for each split would not fill the GPU better
SUMMED = 1024


@triton.jit(do_not_specialize=["M"])
def logits_kernel(
    x_ptr, w_ptr, out_ptr, M, E, H, x_row, out_row, split_depth,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """x: bf16 [M, H], w: bf16 or fp32 [E, H] -> fp32 [M, E]. SPLITS: those that one program adds up, all or 1; with 1 a
    split's sum goes to its own [M, E]."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    first_split = tl.program_id(2)
    x_rows = x_ptr + row.to(tl.int64)[None, :] * x_row
    w_rows = w_ptr + expert.to(tl.int64)[:, None] * H
    total = tl.zeros((EXPERTS, TOKENS), tl.float32)
    for split in range(first_split, first_split + SPLITS):
        part = tl.zeros((EXPERTS, TOKENS), tl.float32)
        for start in range(split * split_depth, tl.minimum((split + 1) * split_depth, H), DEPTH):
            depth = start + tl.arange(0, DEPTH)
            x = tl.load(x_rows + depth[:, None], mask=(row < M)[None, :] & (depth < H)[:, None], other=0.0)
            w = tl.load(w_rows + depth[None, :], mask=(expert < E)[:, None] & (depth < H)[None, :], other=0.0)
            part = tl.dot(w, x.to(w.dtype), part, input_precision="ieee")
        total += part
    where = (first_split * M + row).to(tl.int64)[None, :] * out_row + expert[:, None]
    tl.store(out_ptr + where, total, mask=(row < M)[None, :] & (expert < E)[:, None])


@triton.jit
def sum_kernel(part_ptr, out_ptr, E, out_row, size, SPLITS: tl.constexpr, SUMMED: tl.constexpr):
    """part: fp32 [SPLITS, M, E] -> [M, E], in ascending order."""
    at = tl.program_id(0) * SUMMED + tl.arange(0, SUMMED)
    total = tl.zeros((SUMMED,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(part_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at // E * out_row + at % E, total, mask=at < size)


@triton.jit
def route_kernel(
    logit_ptr, bias_ptr, id_ptr, weight_ptr, scaling, E, logit_row, id_row, weight_row,
    HAS_BIAS: tl.constexpr, SOFTMAX: tl.constexpr, GROUP_RULE: tl.constexpr, NORMALISES: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):  # fmt: skip
    """GROUP_RULE: 0 none, 1 best of a group, 2 sum of its best two. Ties go to the lower id, as in router/gate.py."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < E
    logit = tl.load(logit_ptr + token * logit_row + expert, mask=inside, other=float("-inf"))
    if SOFTMAX:
        power = tl.exp(logit - tl.max(logit, 0))
        score = power / tl.sum(power, 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    choice = tl.where(choice == choice, choice, -1.0e30)  # no NaN may choose an expert that does not exist
    choice = tl.where(inside, choice, float("-inf"))
    if GROUP_RULE > 0:
        group_size = E // GROUPS
        group_of = expert // group_size
        group = tl.arange(0, GROUPS_PADDED)
        group_score = tl.full((GROUPS_PADDED,), float("-inf"), tl.float32)
        for g in tl.static_range(GROUPS):
            own = tl.where(group_of == g, choice, float("-inf"))
            total = tl.max(own, 0)
            if GROUP_RULE == 2:
                second = tl.max(tl.where(expert == tl.argmax(own, 0), float("-inf"), own), 0)
                total += tl.where(group_size > 1, second, 0.0)
            group_score = tl.where(group == g, total, group_score)
        is_kept = tl.zeros((EXPERTS,), tl.int1)
        for _ in tl.static_range(KEPT):
            best = tl.argmax(group_score, 0)
            is_kept = is_kept | (group_of == best)
            group_score = tl.where(group == best, float("-inf"), group_score)
        choice = tl.where(is_kept & inside, choice, float("-inf"))
    slot = tl.arange(0, SLOTS)
    ids = tl.zeros((SLOTS,), tl.int32)
    weights = tl.zeros((SLOTS,), tl.float32)
    total = 0.0
    for k in tl.static_range(TOP_K):
        best = tl.argmax(choice, 0)
        weight = tl.sum(tl.where(expert == best, score, 0.0), 0)  # of the score without the bias (DESIGN law 6)
        ids = tl.where(slot == k, best, ids)
        weights = tl.where(slot == k, weight, weights)
        choice = tl.where(expert == best, float("-inf"), choice)
        total += weight
    if NORMALISES:
        weights = weights / (total + 1e-20)
    tl.store(id_ptr + token * id_row + slot, ids.to(tl.int64), mask=slot < TOP_K)
    tl.store(weight_ptr + token * weight_row + slot, weights * scaling, mask=slot < TOP_K)


def gate_logits(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x: bf16 [M, H] (rows may be strided), weight: bf16 or fp32 [E, H] -> fp32 [M, E]."""
    (rows, hidden), experts = x.shape, weight.shape[0]
    out = torch.empty(rows, experts, device=x.device) if out is None else out
    if rows == 0:
        return out
    depth, many_tokens, warps = (32, FEW_TOKENS, 8) if weight.dtype == torch.float32 else (64, MANY_TOKENS, 4)
    split_depth = triton.cdiv(triton.cdiv(hidden, SPLITS), depth) * depth
    expert_tiles = triton.cdiv(experts, EXPERTS)
    in_one = triton.cdiv(rows, many_tokens) * expert_tiles >= ENOUGH_PROGRAMS
    tokens, programs = (many_tokens, 1) if in_one else (FEW_TOKENS, SPLITS)
    to = out if in_one else torch.empty(SPLITS * rows, experts, device=x.device)
    logits_kernel[(triton.cdiv(rows, tokens), expert_tiles, programs)](
        x, weight, to, rows, experts, hidden, x.stride(0), to.stride(0), split_depth,
        TOKENS=tokens, EXPERTS=EXPERTS, DEPTH=depth, SPLITS=SPLITS // programs, num_warps=warps, num_stages=4,
    )  # fmt: skip
    if not in_one:
        size = rows * experts
        sum_kernel[(triton.cdiv(size, SUMMED),)](
            to, out, experts, out.stride(0), size, SPLITS=SPLITS, SUMMED=SUMMED, num_warps=4
        )
    return out


def route(
    logits: Tensor,
    correction_bias: Tensor | None,
    scoring_func: Literal["sigmoid", "softmax"],
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"],
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """logits: fp32 [M, E] -> topk_idx int64 [M, k], topk_weights fp32 [M, k]. Arguments as in router/gate.py."""
    (rows, experts), device = logits.shape, logits.device
    assert logits.dtype == torch.float32, f"gate logits must be fp32, not {logits.dtype}"
    if out is None:
        out = torch.empty(rows, top_k, dtype=torch.int64, device=device), torch.empty(rows, top_k, device=device)
    ids, weights = out
    if rows:
        route_kernel[(rows,)](
            logits, correction_bias, ids, weights, routed_scaling_factor, experts,
            logits.stride(0), ids.stride(0), weights.stride(0),
            HAS_BIAS=correction_bias is not None, SOFTMAX=scoring_func == "softmax",
            GROUP_RULE={"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}[topk_method], NORMALISES=norm_topk_prob,
            GROUPS=n_group, KEPT=topk_group, TOP_K=top_k, EXPERTS=triton.next_power_of_2(experts),
            SLOTS=triton.next_power_of_2(top_k), GROUPS_PADDED=triton.next_power_of_2(n_group), num_warps=1,
        )  # fmt: skip
    return out
