"""An engine as a process that can be frozen: it computes only while it is its turn, and its memory is known."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from .session import Answers

STOP_S = 30.0


class EngineFailed(Exception):
    """The driver ended or did not answer; the message holds the last words of its log."""


@dataclass(frozen=True, slots=True)
class Command:
    """How to start one engine's driver."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class EngineProcess:
    """One driver and its children, in a session of their own. Frozen (SIGSTOP) except while it starts or has a job."""

    def __init__(self, name: str, command: Command, log: Path, cwd: Path) -> None:
        self.name, self._log = name, log
        self._began = time.monotonic()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command.argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | dict(command.env),
                cwd=cwd,
                start_new_session=True,
            )
        self._unread = b""
        self.version, self.start_s = "", 0.0

    def wait_ready(self, timeout_s: float) -> None:
        """Until the warm-up has been answered. Raises EngineFailed."""
        told = json.loads(self._read_line(timeout_s))
        self.version, self.start_s = told["version"], time.monotonic() - self._began
        self._signal(signal.SIGSTOP)

    def run(self, prompts: Sequence[list[int]], new_tokens: int, timeout_s: float) -> Answers:
        """Raises EngineFailed."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        job = {"prompts": list(prompts), "new_tokens": new_tokens}
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(self._last_words()) from None
        answers = Answers(**json.loads(self._read_line(timeout_s)))
        self._signal(signal.SIGSTOP)
        return answers

    @property
    def peak_mib(self) -> float:
        return peak_of(self.processes()) / 2**20

    def processes(self) -> list[psutil.Process]:
        return tree_of(self._process.pid)

    def close(self) -> None:
        """Asks, then insists; afterwards no process of it is left. A second call does nothing."""
        if self._process.poll() is not None:
            return
        group = self.processes()
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        for process in group:
            if process.is_running():
                process.kill()
        psutil.wait_procs(group, STOP_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EngineFailed(f"no answer within {timeout_s:g} s; " + self._last_words())
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise EngineFailed(self._last_words())
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines[-1] if lines else "it said nothing")[-300:]

    def _signal(self, number: signal.Signals) -> None:
        """To every process of the tree: worker processes may have left the driver's process group."""
        for process in self.processes():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def run_once(argv: Sequence[str], cwd: Path) -> None:
    """A helper in a rival's environment. Raises EngineFailed."""
    done = subprocess.run(list(argv), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise EngineFailed((done.stderr.strip().splitlines() or ["it said nothing"])[-1])


def tree_of(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def peak_of(processes: Iterable[psutil.Process]) -> int:
    """The high-water marks of every process's resident memory, added up, as the kernel kept them."""
    total = 0
    for process in processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return total
