"""Floors, shares of the ceilings and targets met or missed: arithmetic over what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def ceilings_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the section "ceilings": {"copy GB/s": .., "bf16 TFLOP/s": .., "fp8 TFLOP/s": ..}, those that were measured."""
    return {row["name"]: row["value"] for row in rows if "value" in row}


def judged(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """A row of "speed" with `floor_us`, `share` of the ceiling that binds, `bound`, and `passed` where it has a target.

    Without the ceiling that it needs, or without a time, a row stays as it is.
    """
    copy, rate = ceilings.get("copy GB/s"), ceilings.get(f"{row.get('rate')} TFLOP/s")
    if "us" not in row or copy is None or rate is None:
        return dict(row)
    memory_us, matrix_us = row["bytes"] / copy / 1e3, row["flop"] / rate / 1e6
    floor_us = max(memory_us, matrix_us)
    told = {
        "floor_us": floor_us,
        "share": floor_us / row["us"],
        "bound": "memory" if memory_us >= matrix_us else "matrix",
        "gb_s": row["bytes"] / row["us"] / 1e3,
        "tflop_s": row["flop"] / row["us"] / 1e6,
    }
    target = row.get("target")
    if target:
        reached = {"bandwidth": memory_us / row["us"], "rate": matrix_us / row["us"], "tflop_s": told["tflop_s"]}
        told |= {"reached": reached[target["of"]], "passed": reached[target["of"]] >= target["least"]}
    return dict(row) | told
