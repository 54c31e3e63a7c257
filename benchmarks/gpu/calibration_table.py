"""The calibration that router/calibration.py reads, out of the result of the GPU script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = {
    "experts": ("held", "tokens", "us", "tokens_per_s"),
    "attention": ("batch", "context", "us", "tokens_per_s"),
}


def calibration(result: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the section "layers" that were measured, as docs/kernels.md describes them."""
    measured = [row for row in result["sections"].get("layers", {}).get("rows", []) if "us" in row]
    tables = {
        part: [{field: row[field] for field in fields} for row in measured if row["part"] == part]
        for part, fields in FIELDS.items()
    }
    machine = result["machine"]
    return {"gpu": machine["gpu"], "date": machine["date"], "model": result["shapes"]} | tables
