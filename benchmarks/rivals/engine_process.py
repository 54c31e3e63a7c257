"""An engine as a process that can be frozen: it computes only while it is its turn, and its memory is known."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from ..machine import OthersCores
from .session import Answers

STOP_S, ORPHANS_S = 60.0, 3.0
TOLD_S = 0.5  # the system counts in hundredths of a second: shorter jobs do not tell whether others computed


class EngineFailed(Exception):
    """The driver ended or did not answer; the message holds the last words of its log."""


@dataclass(frozen=True, slots=True)
class Command:
    """How to start one engine's driver."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class EngineProcess:
    """One driver and its children, in a session of their own. Frozen (SIGSTOP) except while it starts and `awake`.

    `others_cores`: how many cores others used at most while it ran a job.
    """

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
        self._unread, self._seen = b"", dict[int, psutil.Process]()
        self.version, self.start_s, self.others_cores = "", 0.0, 0.0

    def wait_ready(self, timeout_s: float) -> None:
        """Until the warm-up has been answered. Raises EngineFailed, and then nothing is left that disturbs others."""
        try:
            told = json.loads(self._read_line(timeout_s))
        except EngineFailed:
            self.close()
            raise
        self.version, self.start_s = told["version"], time.monotonic() - self._began
        self._freeze()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Its turn. It answers a short prompt first, which takes it through whatever it does after a long sleep."""
        self._signal(signal.SIGCONT)
        try:
            self.run([[5, 6, 7, 8]], 2, STOP_S)
            yield
        finally:
            self._freeze()

    def run(self, prompts: Sequence[list[int]], new_tokens: int, timeout_s: float) -> Answers:
        """While it is awake. Raises EngineFailed, also where an answer is shorter than was asked."""
        assert self._process.stdin is not None
        job = json.dumps({"prompts": list(prompts), "new_tokens": new_tokens}).encode() + b"\n"
        with OthersCores(self.processes) as others:
            try:
                self._process.stdin.write(job)
                self._process.stdin.flush()
            except BrokenPipeError:
                raise EngineFailed(self._last_words()) from None
            line = self._read_line(timeout_s)
        if others.seconds >= TOLD_S:
            self.others_cores = max(self.others_cores, others.cores)
        answers = Answers(**json.loads(line))
        counts = [len(ids) for ids in answers.token_ids]
        if counts != [new_tokens] * len(prompts):
            raise EngineFailed(f"asked for {new_tokens} tokens of {len(prompts)} prompts, got {counts}")
        return answers

    @property
    def peak_mib(self) -> float:
        return peak_of(self.processes()) / 2**20

    def processes(self) -> list[psutil.Process]:
        """The driver, all below it and all of its session; what was seen once is not forgotten when its parent is gone.

        Children may leave the session, and an orphan whose parent nobody saw is in no tree.
        """
        if self._process.returncode is None:  # else its number may be another's by now
            found = [*tree_of(self._process.pid), *_session_of(self._process.pid)]
            self._seen |= {process.pid: process for process in found}
        return [process for process in self._seen.values() if not _has_ended(process)]

    def close(self) -> None:
        """Asks, then insists; afterwards no process of it is left. A second call does nothing."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        for last_resort in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(STOP_S)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(last_resort)
        wait_until(lambda: not self.processes(), ORPHANS_S)
        self._signal(signal.SIGKILL)
        wait_until(lambda: not self.processes(), STOP_S)
        self._process.wait()
        self._process.stdout.close()

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

    def _freeze(self) -> None:
        """A process that computes takes note of the signal a little later: nobody's turn begins before that."""
        self._signal(signal.SIGSTOP)
        wait_until(lambda: not any(_computes(process) for process in self.processes()), STOP_S)

    def _signal(self, number: signal.Signals) -> None:
        """To every process of the tree: worker processes may have left the driver's process group."""
        for process in self.processes():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def wait_until(is_reached: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_reached() and time.monotonic() < deadline:
        time.sleep(0.001)


def _session_of(leader: int) -> Iterator[psutil.Process]:
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader:
                yield psutil.Process(pid)


def _has_ended(process: psutil.Process) -> bool:
    """A zombie has: in a container whose first process reaps nobody, an orphan stays one."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _computes(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


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
