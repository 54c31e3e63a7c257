"""Where clusters started on this machine are recorded: one folder per name in the user's cache directory.

A record names the supervisor by pid *and* start time, and the session its processes share, so that nothing is ever
mistaken for ours because a number was used again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ClusterExists, ClusterNotFound, StartFailed
from .processes import Process, end_processes, is_alive, members

RECORD = "record.json"
# Ray appends about 69 characters to its folder (session_<date>_<time>_<pid>/sockets/plasma_store); AF_UNIX takes 107.
LONGEST_RUN_DIR = 36
LEAST_FREE = 32 * 2**20  # bytes for Ray's logs and session; without them Ray waits half a minute and does not say why
KEPT_LOGS = 5
LOGS = "_logs"  # beside the clusters' folders, so it must not be the name of one


@dataclass(frozen=True, slots=True)
class Record:
    """`run_dir` holds sockets, Ray's session and logs; `supervisor` is None until it was spawned."""

    name: str
    run_dir: str
    host: str
    http_port: int
    grpc_port: int
    model: str
    ray_address: str | None
    owner: Process
    supervisor: Process | None = None

    @property
    def log_file(self) -> Path:
        return Path(self.run_dir) / "up.log"

    @property
    def control_path(self) -> Path:
        return Path(self.run_dir) / "control"

    def is_alive(self) -> bool:
        return is_alive(self.supervisor or self.owner)

    def processes(self) -> list[Process]:
        """The supervisor's session: it cannot be left by accident, and its number stays taken while a member lives."""
        return members(self.supervisor) if self.supervisor else []

    def end(self, grace_s: float) -> list[Process]:
        """Ends all of them, then those that they were just starting. Returns those that had to be killed."""
        return [killed for _ in range(2) for killed in end_processes(self.processes(), grace_s)]


def default_root() -> Path:
    return Path.home() / ".cache" / "braid"


class Registry:
    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def claim(self, record: Record) -> Record:
        """Takes the name and makes the run folder; sweeps up after a cluster that died without a word."""
        with self._locked():
            self.refuse_if_up(record.name)
            self._sweep(record.name, self.find(record.name))
            folder = self.root / record.name
            folder.mkdir(mode=0o700, parents=True)
            claimed = replace(record, run_dir=str(_run_dir(folder)))
            self._check_room(claimed)
            self.write(claimed)
            return claimed

    def _check_room(self, claimed: Record) -> None:
        free = shutil.disk_usage(claimed.run_dir).free
        if free < LEAST_FREE:
            self.remove(claimed)
            raise StartFailed(
                f"{claimed.run_dir}, for logs and sockets, has {free / 2**20:.0f} MiB of free disk and a cluster wants "
                f"{LEAST_FREE / 2**20:.0f}: make room there"
            )

    def refuse_if_up(self, name: str) -> None:
        record = self.find(name)
        if record is not None and record.is_alive():
            pid = (record.supervisor or record.owner).pid
            raise ClusterExists(
                f"cluster {name!r} is already up (pid {pid}, HTTP {record.host}:{record.http_port}): "
                f"take another --name, or `braid down --name {name}` first"
            )

    def write(self, record: Record) -> None:
        write_json(self.root / record.name / RECORD, asdict(record))

    def find(self, name: str) -> Record | None:
        try:
            data = json.loads((self.root / name / RECORD).read_text())
        except (OSError, ValueError):
            return None
        supervisor = data.pop("supervisor")
        return Record(
            **data | {"owner": Process(**data["owner"])}, supervisor=Process(**supervisor) if supervisor else None
        )

    def get(self, name: str) -> Record:
        record = self.find(name)
        if record is None:
            known = [record.name for record in self.all() if record.is_alive()]
            there = f"up here: {', '.join(known)}" if known else "none is up here"
            raise ClusterNotFound(
                f"no cluster {name!r} was started on this machine ({there}); start one with `braid up`"
            )
        return record

    def all(self) -> list[Record]:
        names = sorted(path.parent.name for path in self.root.glob(f"*/{RECORD}"))
        return [record for name in names if (record := self.find(name)) is not None]

    def remove(self, record: Record) -> None:
        """Idempotent: takes the run folder, wherever it stands, and the name."""
        shutil.rmtree(record.run_dir, ignore_errors=True)
        shutil.rmtree(self.root / record.name, ignore_errors=True)

    def keep_logs(self, record: Record) -> Path:
        """Saves what explains a failure before the run folder goes; the newest few are kept.

        What cannot be saved is let go, on a full disk everything: the failure itself must still be told.
        """
        kept = self.root / LOGS / f"{record.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        for path in [record.log_file, *Path(record.run_dir).glob("ray/session_2*/logs")]:
            with suppress(OSError):
                kept.mkdir(mode=0o700, parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.copytree(path, kept / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)
                elif path.exists():
                    shutil.copy2(path, kept)
        for old in sorted(kept.parent.glob("*"), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
            shutil.rmtree(old, ignore_errors=True)
        return kept

    def _sweep(self, name: str, record: Record | None) -> None:
        if record is not None:
            record.end(grace_s=0.0)
            self.remove(record)
        shutil.rmtree(self.root / name, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all: readers never see half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data))
    temporary.replace(path)


def _run_dir(folder: Path) -> Path:
    """The claimed folder itself, or a short one in the system's temp folder when socket paths would grow too long."""
    if len(str(folder)) <= LONGEST_RUN_DIR:
        return folder
    return Path(tempfile.mkdtemp(prefix="braid-"))
