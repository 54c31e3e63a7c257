"""What the sections of the GPU script are told, and the form of what they give: rows of plain JSON, one by one."""

from __future__ import annotations

import faulthandler
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from braid.model.config import ModelConfig

from .cases import Draw
from .sizes import MODELS

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """`shapes`: a name of sizes.MODELS; `stop_at`: of time.monotonic(), when the section must have ended.

    `skip`: rows that were begun by a process before this one; `begin` hears the name of each of ours. `row_s`: seconds
    after which a row ends the process, as a kernel that waits for ever cannot be ended otherwise.
    """

    device: torch.device
    shapes: str
    stop_at: float
    rivals: Path | None = None
    skip: int = 0
    begin: Callable[[str], None] = lambda name: None
    row_s: float | None = None

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
    """One row a name; what fails, or comes when the time is up, says so in its own row, under "failed".

    Raises, after the row, what a kernel of it has made of the device: no other row can be had in this process.
    """
    for name, work in islice(names, setting.skip, None):
        if not setting.has_time:
            yield {"name": name, "failed": "not reached: the section's time was up"}
            continue
        setting.begin(name)
        if setting.row_s is not None:
            faulthandler.dump_traceback_later(setting.row_s, exit=True)
        try:
            row = finite(work())
        except Exception as error:  # whatever it is, the other rows must not go with it
            row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        if setting.row_s is not None:
            faulthandler.cancel_dump_traceback_later()
        yield {"name": name} | row
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def rows_of(file: Path) -> list[Row]:
    """What its lines of JSON told last of every row."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return list({row["name"]: row for row in rows}.values())


def finite(row: Row) -> Row:
    """ValueError where a figure is NaN or infinite, which JSON has no word for."""
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise ValueError(f"{', '.join(bad)}: NaN or infinite")
    return row
