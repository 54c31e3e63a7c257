"""How long each kernel takes at DeepSeek-V3's sizes, with the work that a floor is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from statistics import fmean

import torch

from . import cases_attention, cases_experts, cases_products, cases_rows
from .cases import Case
from .setting import Row, Setting, each
from .timing import copies, timed


def measure(setting: Setting) -> Iterator[Row]:
    """Rows with the Timing, `bytes`, `flop`, `rate` and the case's target, if it has one."""
    return each(setting, ((case.name, partial(_measured, case, setting)) for case in cases(setting)))


def cases(setting: Setting) -> Iterator[Case]:
    """Those with a target first, so that they are reached whatever the time."""
    config = setting.config
    if not setting.is_full_size:
        yield from cases_products.cases(config, 2)
        yield cases_attention.decode_case(config, 2, 70, config.num_attention_heads)
        return
    for rows in (1, 64):
        yield from cases_products.cases(config, rows)
    for held in (8, 32):
        for rows in (1, 32, 128, 512, 4096):
            yield cases_experts.grouped_case(config, rows, held)
    for sequences, context, heads, queries in (
        (1, 4096, 128, 1),
        (32, 4096, 128, 1),
        (128, 8192, 128, 1),
        (128, 8192, 16, 1),
        (8, 131072, 16, 1),
        (128, 8192, 16, 3),
        (64, 8192, 64, 2),
        (64, 8192, 128, 2),
    ):
        yield cases_attention.decode_case(config, sequences, context, heads, queries)
    yield cases_attention.prefill_case(config, 4096, expands=False)
    yield from cases_products.cases(config, 4096)
    yield cases_attention.prefill_case(config, 4096)
    yield cases_attention.prefill_case(config, 2048, 8192)
    for rows in (1, 128, 4096):
        yield from cases_rows.cases(config, rows)
        yield from cases_attention.row_cases(config, rows)
    for rows in (16, 32, 128, 512):
        yield from cases_products.cases(config, rows)


def _measured(case: Case, setting: Setting) -> Row:
    torch.manual_seed(0)
    runs = [case.bind(setting.draw) for _ in range(copies(case.work.num_bytes, setting.device))]
    took = timed([run.actual for run in runs], setting.device)
    told = {"kernel": case.kernel, "shape": case.shape, "rows": case.rows, "copies": len(runs)}
    works = [run.work or case.work for run in runs]
    work = {"bytes": fmean(work.num_bytes for work in works), "flop": fmean(work.flop for work in works)}
    return told | asdict(took) | work | {"rate": case.work.rate, "target": case.target and asdict(case.target)}
