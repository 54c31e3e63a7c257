"""Gate logits against float64, the choice of experts against router/gate.py."""

from typing import Literal

import pytest
import torch

from braid.kernels.gpu import gate
from braid.router.gate import route


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_same_bits_alone_and_summed_by_one_program(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(18, 210).bfloat16()[:, 10:], torch.randn(70, 200).to(dtype)
    out = torch.full((18, 80), torch.nan)[:, :70]
    logits = gate.gate_logits(x, weight, out)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
    assert torch.equal(gate.gate_logits(x[17:], weight), logits[17:])
    monkeypatch.setattr(gate, "ENOUGH_PROGRAMS", 1)
    assert torch.equal(gate.gate_logits(x, weight), logits)


Scoring = Literal["sigmoid", "softmax"]
Method = Literal["noaux_tc", "group_limited_greedy", "greedy"]


@pytest.mark.parametrize(
    ("scoring", "method", "experts", "top_k", "n_group", "topk_group", "normalises"),
    [
        ("sigmoid", "noaux_tc", 256, 8, 8, 4, True),
        ("sigmoid", "noaux_tc", 24, 4, 4, 2, True),
        ("sigmoid", "noaux_tc", 6, 2, 6, 3, True),  # groups of one
        ("softmax", "group_limited_greedy", 24, 3, 4, 2, False),
        ("softmax", "greedy", 20, 3, 1, 1, True),
    ],
)
def test_the_choice_is_the_routers(
    scoring: Scoring, method: Method, experts: int, top_k: int, n_group: int, topk_group: int, normalises: bool
) -> None:
    torch.manual_seed(experts)
    logits = torch.randn(4, experts)
    logits[2:] = logits[2:].round()  # with ties between experts and between groups
    bias = (torch.randn(experts) / 4).round(decimals=1) if method == "noaux_tc" else None
    arguments = (logits, bias, scoring, method, top_k, n_group, topk_group, normalises, 2.5)
    ids, weights = torch.full((4, top_k + 1), -1)[:, :top_k], torch.full((4, top_k + 1), torch.nan)[:, :top_k]
    gate.route(*arguments, out=(ids, weights))
    expected_ids, expected_weights = route(*arguments)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-7)
    alone = gate.route(logits[1:2], *arguments[1:])
    assert torch.equal(alone[0], ids[1:2])
    assert torch.equal(alone[1], weights[1:2])


def test_a_row_of_nan_still_names_experts_that_exist() -> None:
    logits = torch.full((2, 20), torch.nan)
    logits[1, 5:] = 1.0
    ids, _ = gate.route(logits, None, "sigmoid", "noaux_tc", 4, 4, 2, True, 1.0)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < 20
