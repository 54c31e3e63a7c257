"""What this GPU allows at best, measured by torch in the same run: copy bandwidth and matrix rates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from .setting import Row, Setting, each
from .timing import timed


def measure(setting: Setting) -> Iterator[Row]:
    """Rows "copy GB/s", "bf16 TFLOP/s" and "fp8 TFLOP/s", each with its `value`."""
    work = {"copy GB/s": _copy, "bf16 TFLOP/s": _bf16, "fp8 TFLOP/s": _fp8}
    return each(setting, ((name, partial(function, setting)) for name, function in work.items()))


def _copy(setting: Setting) -> Row:
    num_bytes = 1 << 32 if setting.is_full_size else 1 << 20
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=setting.device)
    to = torch.empty_like(source)
    took = timed([lambda: to.copy_(source)], setting.device)
    return {"value": 2 * num_bytes / took.us / 1e3, "us": took.us}


def _bf16(setting: Setting) -> Row:
    side = _side(setting)
    x, y = setting.draw.normal(side, side), setting.draw.normal(side, side)
    took = timed([lambda: x @ y], setting.device)
    return {"value": 2 * side**3 / took.us / 1e6, "us": took.us}


def _fp8(setting: Setting) -> Row:
    side = _side(setting)
    x, y = setting.draw.codes(side, side), setting.draw.codes(side, side).T
    one = torch.ones((), device=setting.device)

    def multiply() -> torch.Tensor:  # as fast as the instruction allows, without torch's own promotion of sums
        return torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    took = timed([multiply], setting.device)
    return {"value": 2 * side**3 / took.us / 1e6, "us": took.us}


def _side(setting: Setting) -> int:
    return 8192 if setting.is_full_size else 64
