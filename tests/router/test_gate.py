"""The gate against a slow gate in plain Python, its ties, and its bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from braid.router.gate import expert_scores, route

V3: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "top_k": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
V2: dict[str, Any] = V3 | {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
LITE: dict[str, Any] = V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
LONELY: dict[str, Any] = V3 | {"n_group": 16, "topk_group": 5}  # groups of one expert
KINDS = pytest.mark.parametrize("kind", [V3, V2, LITE, LONELY], ids=["v3", "v2", "lite", "lonely"])


def logits_of(count: int, num_experts: int = 16) -> Tensor:
    return torch.randn(count, num_experts, generator=torch.Generator().manual_seed(0))


def slow_route(logits: list[float], bias: list[float], kind: dict[str, Any]) -> dict[int, float]:
    """expert -> weight, best first."""
    if kind["scoring_func"] == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = list(range(len(logits)))
    if kind["topk_method"] != "greedy":
        size = len(logits) // kind["n_group"]
        count = 2 if kind["topk_method"] == "noaux_tc" else 1
        groups = [list(range(g * size, (g + 1) * size)) for g in range(kind["n_group"])]
        groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:count]))
        allowed = sorted(e for group in groups[: kind["topk_group"]] for e in group)
    chosen = sorted(allowed, key=lambda e: -choice[e])[: kind["top_k"]]
    total = sum(scores[e] for e in chosen) if kind["norm_topk_prob"] else 1.0
    return {e: scores[e] / total * kind["routed_scaling_factor"] for e in chosen}


@KINDS
def test_choice_and_weights_are_right(kind: dict[str, Any]) -> None:
    logits = logits_of(50)
    has_bias = kind["topk_method"] == "noaux_tc"
    bias = 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(1)) if has_bias else None
    topk_idx, topk_weights = route(logits, bias, **kind)
    assert topk_weights.dtype == torch.float32
    for row in range(50):
        expected = slow_route(logits[row].tolist(), bias.tolist() if bias is not None else [0.0] * 16, kind)
        assert topk_idx[row].tolist() == list(expected)
        assert topk_weights[row].tolist() == pytest.approx(list(expected.values()), rel=1e-5)


def test_bias_moves_the_choice_and_never_the_weights() -> None:
    logits = torch.zeros(1, 16)
    bias = torch.zeros(16)
    bias[[1, 5, 6, 15]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    topk_idx, topk_weights = route(logits, bias, **V3 | {"n_group": 1, "topk_group": 1})
    assert topk_idx.tolist() == [[1, 5, 6, 15]]
    assert topk_weights.tolist() == [[2.5 / 4] * 4]


@KINDS
def test_ties_go_to_the_lower_expert(kind: dict[str, Any]) -> None:
    topk_idx, _ = route(torch.zeros(300, 16), None, **kind)
    assert (topk_idx == torch.arange(4)).all()


def test_a_negative_bias_cannot_bring_in_a_masked_expert() -> None:
    """With zeros in the masked groups, as some implementations have it, they would win against negative scores."""
    topk_idx, _ = route(logits_of(20), torch.full((16,), -3.0), **V3)
    assert torch.equal(topk_idx, route(logits_of(20), None, **V3)[0])


@KINDS
def test_rows_keep_their_bits(kind: dict[str, Any]) -> None:
    logits = logits_of(41)
    whole = route(logits, None, **kind)
    for first, last in ((0, 1), (3, 5), (7, 40), (40, 41)):
        idx, weights = route(logits[first:last].clone(), None, **kind)
        assert torch.equal(idx, whole[0][first:last])
        assert torch.equal(weights, whole[1][first:last])


def test_half_precision_logits_are_refused() -> None:
    with pytest.raises(AssertionError, match="fp32"):
        route(logits_of(2).bfloat16(), None, **V3)


def test_scores_are_affinities() -> None:
    logits = logits_of(9)
    assert torch.allclose(expert_scores(logits, "sigmoid"), torch.sigmoid(logits), atol=1e-6)
    assert torch.allclose(expert_scores(logits, "softmax").sum(-1), torch.ones(9), atol=1e-6)
