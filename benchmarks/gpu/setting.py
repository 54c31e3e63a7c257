"""What the sections of the GPU script are told, and the form of what they give: rows of plain JSON, one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from braid.model.config import ModelConfig

from .cases import Draw
from .sizes import MODELS

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """`shapes`: a name of sizes.MODELS; `stop_at`: of time.monotonic(), when the section must have ended."""

    device: torch.device
    shapes: str
    stop_at: float
    rivals: Path | None = None

    @property
    def config(self) -> ModelConfig:
        return MODELS[self.shapes]

    @property
    def is_full_size(self) -> bool:
        return self.shapes == "v3"

    @property
    def draw(self) -> Draw:
        return Draw(self.device)

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self.stop_at


Section = Callable[[Setting], Iterator[Row]]


def each(setting: Setting, names: Iterator[tuple[str, Callable[[], Row]]]) -> Iterator[Row]:
    """One row a name; what fails, or comes when the time is up, says so in its own row, under "failed"."""
    for name, work in names:
        if not setting.has_time:
            yield {"name": name, "failed": "not reached: the section's time was up"}
            continue
        try:
            yield {"name": name} | work()
        except Exception as error:  # whatever it is, the other rows must not go with it
            yield {"name": name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
