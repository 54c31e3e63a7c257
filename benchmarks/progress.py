"""Shows how far a long run is: a bar for each part on a terminal, a line for each step elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Told:
    """`begin` a part, `expect` a number of steps, `say` what runs now, `advance` after each."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console)
        self._task: TaskID | None = None
        self._part = ""

    def begin(self, part: str) -> None:
        self.end()
        self._part, self._task = part, self._progress.add_task(part, total=None)

    def expect(self, steps: int) -> None:
        assert self._task is not None, "expect before begin"
        self._progress.update(self._task, total=steps)

    def say(self, what: str) -> None:
        assert self._task is not None, "say before begin"
        self._progress.update(self._task, description=f"{self._part}: {what}")
        if not self._console.is_terminal:
            self._console.print(f"{self._part}: {what}")

    def advance(self) -> None:
        assert self._task is not None, "advance before begin"
        self._progress.advance(self._task)

    def end(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=self._part)
            self._progress.stop_task(self._task)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if self._console.is_terminal:
            self._progress.stop()
