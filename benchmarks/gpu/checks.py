"""Every kernel against float64 of the same operands, at the sizes at which it serves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from braid.kernels.gpu.norm import Quantised

from . import cases_attention, cases_experts, cases_products, cases_rows
from .cases import Case, widened
from .setting import Row, Setting, each


def check(setting: Setting) -> Iterator[Row]:
    """Rows with `error`, `tolerance` and `passed`."""
    return each(setting, ((case.name, partial(_checked, case, setting)) for case in cases(setting)))


def cases(setting: Setting) -> Iterator[Case]:
    config = setting.config
    experts = config.n_routed_experts or 1
    for rows in (1, 33, 256) if setting.is_full_size else (3,):
        yield from cases_rows.cases(config, rows)
        yield from cases_products.cases(config, rows)
        yield from cases_attention.row_cases(config, rows)
        yield from cases_experts.cases(config, rows, min(8, experts // 2))
    heads, (context, prompt) = config.num_attention_heads, (5000, 5000) if setting.is_full_size else (70, 40)
    yield cases_attention.decode_case(config, 3, context, heads)
    yield cases_attention.decode_case(config, 2, context, heads, 2)
    yield cases_attention.decode_case(config, 2, context, heads // 4, 3)
    yield cases_attention.prefill_case(config, prompt)
    yield cases_attention.prefill_case(config, prompt // 4, prompt)


def _checked(case: Case, setting: Setting) -> Row:
    torch.manual_seed(0)
    run = case.bind(setting.draw)
    error = relative_error(run.actual(), run.expected())
    return {"error": error, "tolerance": case.tolerance, "passed": error <= case.tolerance}


def relative_error(actual: Tensor | Quantised, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; for integers the share that differs. NaN counts as inf."""
    got = widened(actual) if isinstance(actual, Quantised) else actual
    if not expected.is_floating_point():
        return float((got.cpu() != expected.cpu()).double().mean()) if expected.numel() else 0.0
    error = float((got.double().to(expected.device) - expected).norm() / expected.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")
