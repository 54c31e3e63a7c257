"""Floors, shares of the ceilings and targets met or missed: arithmetic over what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def ceilings_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the section "ceilings": {"copy GB/s": .., "bf16 TFLOP/s": .., "fp8 TFLOP/s": ..}, those that were measured."""
    return {row["name"]: row["value"] for row in rows if "value" in row}


def floors_us(work: Mapping[str, Any], ceilings: Mapping[str, float]) -> tuple[float, float] | None:
    """What the bytes of `work` and what its products take at the ceilings; None where these lack."""
    copy, rate = ceilings.get("copy GB/s"), ceilings.get(f"{work.get('rate')} TFLOP/s")
    return None if copy is None or rate is None else (work["bytes"] / copy / 1e3, work["flop"] / rate / 1e6)


def judged(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """A row of "speed" with `floor_us`, `share` of the ceiling that binds, `bound`, and `passed` where it has a target.

    Without a time, or the ceilings that it needs, a row stays as it is.
    """
    floors = floors_us(row, ceilings)
    if "us" not in row or floors is None:
        return dict(row)
    memory_us, matrix_us = floors
    told = {
        "floor_us": max(floors),
        "share": max(floors) / row["us"],
        "bound": "memory" if memory_us >= matrix_us else "matrix",
        "gb_s": row["bytes"] / row["us"] / 1e3,
        "tflop_s": row["flop"] / row["us"] / 1e6,
    }
    target = row.get("target")
    if target:
        reached = {"bandwidth": memory_us / row["us"], "rate": matrix_us / row["us"], "tflop_s": told["tflop_s"]}
        told |= {"reached": reached[target["of"]], "passed": reached[target["of"]] >= target["least"]}
    return dict(row) | told
