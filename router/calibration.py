"""What a layer costs on a GPU, as `python -m braid.benchmarks.gpu` measured it: what a capacity planner reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """One MoE layer of an expert worker that holds `held` experts, while `tokens` tokens choose among all of them."""

    held: int
    tokens: int
    us: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One decode step of an attention worker's layer: `batch` sequences of `context` tokens each."""

    batch: int
    context: int
    us: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """`gpu`: its name, None where the script was only tried on a CPU; `model`: whose shapes, "v3" as a rule."""

    gpu: str | None
    model: str
    experts: tuple[ExpertLayer, ...]
    attention: tuple[AttentionLayer, ...]

    @classmethod
    def from_path(cls, path: Path) -> Self:
        """Raises ValueError where the file is not a calibration."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        try:
            experts = tuple(ExpertLayer(**row) for row in values["experts"])
            attention = tuple(AttentionLayer(**row) for row in values["attention"])
            calibration = cls(values["gpu"], values["model"], experts, attention)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a calibration ({error}); write one by python -m braid.benchmarks.gpu --out DIR"
            ) from error
        if not all(row.us > 0 for row in experts) or not all(row.us > 0 for row in attention):
            raise ValueError("a layer that takes no time; measure again by python -m braid.benchmarks.gpu --out DIR")
        return calibration
