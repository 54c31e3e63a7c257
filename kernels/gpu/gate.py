"""The gate: logits in fp32, then the experts of a token as router/gate.py chooses them; one program a token."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGIT_DEPTH = 64


@triton.jit
def logits_kernel(
    x_ptr, w_ptr, out_ptr, M, E, H, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """x: bf16 [M, H], w: fp32 or bf16 [E, H] -> fp32 [M, E]. No split over H: the order of the sum is the row's own."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS, TOKENS), tl.float32)
    for start in range(0, H, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = (depth < H)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * H + depth[None, :], mask=(row < M)[:, None] & inside, other=0.0)
        w = tl.load(w_ptr + expert[:, None] * H + depth[None, :], mask=(expert < E)[:, None] & inside, other=0.0)
        total = tl.dot(w, x.to(w.dtype).T, total, input_precision="ieee")
    where = out_ptr + row.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(where, total.T, mask=(row < M)[:, None] & (expert < E)[None, :])


@triton.jit
def route_kernel(
    logit_ptr, bias_ptr, id_ptr, weight_ptr, scaling, E,
    HAS_BIAS: tl.constexpr, SOFTMAX: tl.constexpr, GROUP_RULE: tl.constexpr, NORMALISES: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):  # fmt: skip
    """GROUP_RULE: 0 none, 1 best of a group, 2 sum of its best two. Ties go to the lower id, as in router/gate.py."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < E
    logit = tl.load(logit_ptr + token * E + expert, mask=inside, other=float("-inf"))
    if SOFTMAX:
        power = tl.exp(logit - tl.max(logit, 0))
        score = power / tl.sum(power, 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=inside, other=0.0)
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
    tl.store(id_ptr + token * TOP_K + slot, ids, mask=slot < TOP_K)
    tl.store(weight_ptr + token * TOP_K + slot, weights * scaling, mask=slot < TOP_K)


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x: bf16 [M, H], weight: fp32 or bf16 [E, H] -> fp32 [M, E]."""
    (rows, hidden), experts = x.shape, weight.shape[0]
    out = torch.empty(rows, experts, device=x.device)
    if rows:
        logits_kernel[(triton.cdiv(rows, 16), triton.cdiv(experts, 64))](
            x, weight, out, rows, experts, hidden, TOKENS=16, EXPERTS=64, DEPTH=LOGIT_DEPTH, num_warps=4, num_stages=3
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
) -> tuple[Tensor, Tensor]:
    """logits: fp32 [M, E] -> topk_idx int32 [M, k], topk_weights fp32 [M, k]. Arguments as in router/gate.py."""
    rows, experts = logits.shape
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, top_k, device=logits.device)
    if rows:
        route_kernel[(rows,)](
            logits, correction_bias, ids, weights, routed_scaling_factor, experts,
            HAS_BIAS=correction_bias is not None, SOFTMAX=scoring_func == "softmax",
            GROUP_RULE={"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}[topk_method], NORMALISES=norm_topk_prob,
            GROUPS=n_group, KEPT=topk_group, TOP_K=top_k, EXPERTS=triton.next_power_of_2(experts),
            SLOTS=triton.next_power_of_2(top_k), GROUPS_PADDED=triton.next_power_of_2(n_group), num_warps=1,
        )  # fmt: skip
    return ids, weights
