"""Chooses the experts of a token and their weights from the gate's logits, as DeepSeek-V2 and V3 do.

Only row-wise steps of fixed order: a token's choice and weights do not depend on its neighbours. Ties go to the lower
expert id.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


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
    """logits: [M, E] fp32 -> topk_idx int64 [M, k], topk_weights fp32 [M, k].

    `correction_bias` [E] decides who is chosen, never with what weight. Scaling follows normalisation in every case.
    """
    assert logits.dtype == torch.float32, f"gate logits must be fp32, not {logits.dtype}"
    scores = expert_scores(logits, scoring_func)
    choice = scores if correction_bias is None else scores + correction_bias
    if topk_method != "greedy":
        choice = _keep_best_groups(choice, n_group, topk_group, by_top_two=topk_method == "noaux_tc")
    # torch.topk promises no order among equals; a stable sort does.
    topk_idx = torch.sort(choice.detach(), dim=-1, descending=True, stable=True).indices[:, :top_k]
    topk_weights = scores.gather(1, topk_idx)
    if norm_topk_prob:
        topk_weights = topk_weights / (_sum_in_slot_order(topk_weights) + 1e-20)
    return topk_idx, topk_weights * routed_scaling_factor


def expert_scores(logits: Tensor, scoring_func: Literal["sigmoid", "softmax"]) -> Tensor:
    """[M, E] affinities. Sigmoid by torch.exp: torch.sigmoid rounds otherwise in the tail of its vector loop."""
    if scoring_func == "sigmoid":
        return 1.0 / (1.0 + torch.exp(-logits))
    return torch.softmax(logits, dim=-1)


def _keep_best_groups(choice: Tensor, n_group: int, topk_group: int, by_top_two: bool) -> Tensor:
    """Sets the experts of all but the best `topk_group` groups to -inf."""
    grouped = choice.view(choice.shape[0], n_group, -1)
    if by_top_two and grouped.shape[-1] > 1:
        best = grouped.topk(2, dim=-1).values
        group_scores = best[..., 0] + best[..., 1]
    else:
        group_scores = grouped.amax(dim=-1)
    order = torch.sort(group_scores.detach(), dim=-1, descending=True, stable=True).indices
    is_dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, order[:, :topk_group], False)
    return grouped.masked_fill(is_dropped[..., None], float("-inf")).view_as(choice)


def _sum_in_slot_order(weights: Tensor) -> Tensor:
    total = weights[:, :1]
    for slot in range(1, weights.shape[1]):
        total = total + weights[:, slot : slot + 1]
    return total
