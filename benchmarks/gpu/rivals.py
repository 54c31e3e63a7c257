"""Other people's kernels in the same run, loaded from a folder that is never committed; ours timed beside each.

The folder holds, as far as they could be gathered: `_flashmla_C.abi3.so` and `vllm/` out of vLLM's wheel, `deep_gemm/`,
`flashinfer/` with `tvm_ffi/`. What is absent or does not load is an empty cell with its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from . import rival_kernels
from .setting import Row, Setting, each
from .timing import timed

Pair = rival_kernels.Pair
IN_GRAPHS = ("vLLM Triton", "DeepGEMM")  # the others plan on the host inside a call


def measure(setting: Setting) -> Iterator[Row]:
    """Rows with `rival`, `us`, `ours_us` and `ratio`, the rival's time over ours."""
    return each(setting, ((f"{rival}: {what}", work) for rival, what, work in comparisons(setting)))


def comparisons(setting: Setting) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    products = [(64, 7168, 2112), (64, 16384, 7168), (128, 1536, 24576), (4096, 7168, 4096)]
    decodes = [(1, 4096), (32, 4096), (128, 8192)]
    makers: list[tuple[str, str, Callable[[Path], Pair]]] = []
    for rows, inputs, outputs in products:
        what = f"fp8 product {inputs} -> {outputs}, {rows} rows"
        for rival, maker in (("vLLM Triton", rival_kernels.vllm_product), ("DeepGEMM", rival_kernels.deep_gemm)):
            makers.append((rival, what, partial(maker, draw=setting.draw, rows=rows, inputs=inputs, outputs=outputs)))
    for sequences, context in decodes:
        what = f"MLA decode, 128 heads, context {context}, {sequences} rows"
        for rival, maker in rival_kernels.DECODES.items():
            makers.append((rival, what, partial(maker, draw=setting.draw, sequences=sequences, context=context)))
    for rival, what, make in makers:
        yield rival, what, partial(_beside, rival, make, setting)


def _beside(rival: str, make: Callable[[Path], Pair], setting: Setting) -> Row:
    if setting.rivals is None:
        raise FileNotFoundError(f"no folder with {rival} was given; pass --rivals DIR")
    if str(setting.rivals) not in sys.path:
        sys.path.append(str(setting.rivals))
    torch.manual_seed(0)
    is_captured = rival in IN_GRAPHS
    their_time, our_time = (timed(runs, setting.device, is_captured) for runs in make(setting.rivals))
    ratio = their_time.us / our_time.us
    row = {"rival": rival, "us": their_time.us, "ours_us": our_time.us, "ratio": ratio}
    return row | ({"passed": ratio >= 1.5} if rival == "vLLM Triton" else {})
