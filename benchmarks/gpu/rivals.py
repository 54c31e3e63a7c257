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

from . import rival_experts, rival_kernels
from .checks import relative_error
from .rival_kernels import Contest
from .setting import Row, Setting, each
from .sizes import V3
from .timing import timed

IN_GRAPHS = ("vLLM Triton", "DeepGEMM")  # the others plan on the host inside a call
AGREES = 0.05  # the norm of the difference over that of our result: rounding stays below it, other work does not


def measure(setting: Setting) -> Iterator[Row]:
    """Rows with `rival`, `us`, `ours_us`, `ratio`, the rival's time over ours, and `difference` of the results."""
    return each(setting, ((f"{rival}: {what}", work) for rival, what, work in comparisons(setting)))


def comparisons(setting: Setting) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    products = [(64, 7168, 2112), (64, 16384, 7168), (128, 1536, 24576), (4096, 7168, 4096)]
    decodes = [(1, 4096), (32, 4096), (128, 8192)]
    experts = [(8, 128), (32, 128), (32, 4096)]
    makers: list[tuple[str, str, Callable[[Path], list[Contest]]]] = []
    for rows, inputs, outputs in products:
        what = f"fp8 product {inputs} -> {outputs}, {rows} rows"
        for rival, maker in (("vLLM Triton", rival_kernels.vllm_product), ("DeepGEMM", rival_kernels.deep_gemm)):
            makers.append((rival, what, partial(maker, draw=setting.draw, rows=rows, inputs=inputs, outputs=outputs)))
    for held, rows in experts:
        what = f"experts fp8 {held} of {V3.n_routed_experts}, {rows} rows"
        for rival, maker in rival_experts.EXPERTS.items():
            makers.append((rival, what, partial(maker, draw=setting.draw, config=V3, rows=rows, held=held)))
    for sequences, context in decodes:
        what = f"MLA decode, 128 heads, context {context}, {sequences} rows"
        for rival, maker in rival_kernels.DECODES.items():
            makers.append((rival, what, partial(maker, draw=setting.draw, sequences=sequences, context=context)))
    for rival, what, make in makers:
        yield rival, what, partial(beside, rival, make, setting)


def beside(rival: str, make: Callable[[Path], list[Contest]], setting: Setting) -> Row:
    """ValueError where the two did not compute the same: then their times are not to be compared."""
    if setting.rivals is None:
        raise FileNotFoundError(f"no folder with {rival} was given; pass --rivals DIR")
    if str(setting.rivals) not in sys.path:
        sys.path.append(str(setting.rivals))
    torch.manual_seed(0)
    contests = make(setting.rivals)
    contests[0].theirs()
    difference = relative_error(contests[0].result(), contests[0].ours().double())
    if difference > AGREES:
        raise ValueError(f"its result differs from ours by {difference:.1%} of the norm: it is called in a wrong way")
    is_captured = rival in IN_GRAPHS
    their_time = timed([contest.theirs for contest in contests], setting.device, is_captured)
    our_time = timed([contest.ours for contest in contests], setting.device, is_captured)
    ratio = their_time.us / our_time.us
    row = {"rival": rival, "us": their_time.us, "ours_us": our_time.us, "ratio": ratio, "difference": difference}
    return row | ({"passed": ratio >= 1.5} if rival == "vLLM Triton" else {})
