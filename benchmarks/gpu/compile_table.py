"""The compile gate's JSON as lines of a table: one a kernel and tile, of its several launches the largest figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from .verdict import INSTRUCTIONS

COLUMNS = ("launches", "warps", "stages", "registers", "spills B", "shared B", *INSTRUCTIONS)


def lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str], bool]]:
    """Kernel, tile, the cells of COLUMNS, and whether one of the launches is refused."""
    for (kernel, tile), group in groupby(result["kernels"], key=lambda each: (each["kernel"], each["tile"])):
        every = list(group)
        seen = [each["measured"] for each in every if each["measured"]]
        figures = [len(every), _most(seen, "warps"), max(each["num_stages"] for each in every)]
        figures += [_most(seen, name) for name in ("registers", "spill_bytes", "shared_bytes")]
        figures += [_most([m["instructions"] for m in seen], name) for name in INSTRUCTIONS]
        yield kernel, tile, [str(figure) for figure in figures], any(each["broken"] for each in every)


def _most(figures: list[Mapping[str, int]], name: str) -> int:
    return max((each[name] for each in figures), default=0)
