"""The shell around a worker: answers from the first moment, and takes its folder away at last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from braid.actors.settings import WorkerSettings
from braid.actors.view import ClusterView, WorkerInfo
from braid.cluster import worker_process
from braid.cluster.worker_process import WorkerProcess


class Idle:
    """A worker that does nothing, so that no weights are needed."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.views: list[ClusterView] = []

    def prepare(self) -> WorkerInfo:
        assert Path(self.settings.run_dir).is_dir()
        return WorkerInfo("w", "decode", 1, "h", "", "", 1, os.getpid(), "n")

    def progress(self) -> dict[str, object]:
        return {"phase": "ready"}

    def apply(self, view: ClusterView) -> None:
        self.views.append(view)

    def status(self) -> dict[str, object]:
        return {"sequences": len(self.views)}

    def stop(self) -> None:
        pass


def test_it_answers_before_during_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sockets"
    monkeypatch.setattr(worker_process, "make_worker", Idle)
    shell = WorkerProcess(
        WorkerSettings("c", "w", "decode", 1, "n", "/m", "auto", b"", str(folder), "127.0.0.1", "auto", 1)
    )
    assert shell.progress()["phase"] == "importing"
    assert shell.status() == {"pid": os.getpid()}
    assert shell.prepare().name == "w"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert shell.progress() == {"phase": "ready"}
    shell.apply(ClusterView(1, (), None))
    assert shell.status() == {"sequences": 1}
    (folder / "of-another-worker").touch()
    shell.stop()
    assert folder.exists()
    (folder / "of-another-worker").unlink()
    shell.stop()
    assert not folder.exists()
