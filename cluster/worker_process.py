"""What runs in a worker's actor process: the worker itself, imported there, so that only workers ever import torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..actors.settings import WorkerSettings
from ..actors.view import ClusterView, WorkerInfo


class Worker(Protocol):
    def prepare(self) -> WorkerInfo: ...
    def progress(self) -> dict[str, Any]: ...
    def apply(self, view: ClusterView) -> None: ...
    def status(self) -> dict[str, Any]: ...
    def stop(self) -> None: ...


class WorkerProcess:
    """Answers `progress` and `status` from the first moment on, while `prepare` still imports and loads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._worker: Worker | None = None

    def prepare(self) -> WorkerInfo:
        Path(self.settings.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._worker = make_worker(self.settings)
        return self._worker.prepare()

    def progress(self) -> dict[str, Any]:
        if self._worker is None:
            return {"phase": "importing", "done_bytes": 0, "total_bytes": 0}
        return self._worker.progress()

    def apply(self, view: ClusterView) -> None:
        assert self._worker is not None, "apply before prepare"
        self._worker.apply(view)

    def status(self) -> dict[str, Any]:
        return self._worker.status() if self._worker else {"pid": os.getpid()}

    def stop(self) -> None:
        """The last worker on a host takes the sockets' folder away."""
        if self._worker is not None:
            self._worker.stop()
        with suppress(OSError):
            Path(self.settings.run_dir).rmdir()


def make_worker(settings: WorkerSettings) -> Worker:
    if settings.role == "expert":
        from ..actors.expert_worker import ExpertWorker

        return ExpertWorker(settings)
    from ..actors.attention_worker import AttentionWorker

    return AttentionWorker(settings)
