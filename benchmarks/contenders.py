"""Who takes part in the comparison, how each is started, and in which sections it is measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braid.benchmarks.rivals.engine_process import Command
from braid.benchmarks.rivals.install import BENCH, is_installed, python_of

Dtype = Literal["bf16", "fp32"]
CLUSTERS = Path(__file__).resolve().parent / "clusters"
READY_TIMEOUT_S = 300.0
COLOCATED, DISAGGREGATED = "Braid, colocated", "Braid, disaggregated"
_DRIVERS = "braid.benchmarks.rivals."


@dataclass(frozen=True, slots=True)
class Contender:
    """`rounds` and `new_tokens` bound what an engine is asked where it is so slow that the run would never end."""

    name: str
    command: Command
    is_ours: bool = False
    environment: str | None = None
    rounds: int | None = None
    new_tokens: int | None = None

    def missing(self) -> str | None:
        """Why it cannot take part, if so."""
        if self.environment is None or is_installed(self.environment):
            return None
        return f"not installed; see .bench/{self.environment}.log"


@dataclass(frozen=True, slots=True)
class Section:
    """One table: engines that take turns on one checkpoint; prompts of `prompt_tokens`, and one of `long_tokens`."""

    name: str
    title: str
    dtype: Dtype
    contenders: Sequence[Contender]
    rounds: int
    starts: int
    new_tokens: int = 128
    concurrency: Sequence[int] = (1, 8, 32)
    prompt_tokens: int = 128
    long_tokens: int = 2048

    @property
    def checkpoint(self) -> str:
        return f"small-{self.dtype}"


def sections(threads: int) -> list[Section]:
    """The full run."""
    return [
        Section("bf16", "BF16, engines alone", "bf16", _engines("bf16", threads), rounds=5, starts=5),
        Section(
            "fp32", "FP32, engines alone", "fp32", _engines("fp32", threads)[:-2], rounds=5, starts=1, new_tokens=64
        ),
        Section(
            "http", "BF16, through OpenAI HTTP", "bf16", _servers("bf16", threads), rounds=5, starts=1, new_tokens=64
        ),
    ]


def quick_sections(threads: int) -> list[Section]:
    """Proves that everything runs; its figures are hints."""
    small = {"rounds": 1, "starts": 1, "new_tokens": 16, "concurrency": (1, 8), "long_tokens": 512}
    return [
        Section("bf16", "BF16, engines alone", "bf16", _engines("bf16", threads), **small),  # type: ignore[arg-type]
        Section("http", "BF16, through OpenAI HTTP", "bf16", _servers("bf16", threads), **small),  # type: ignore[arg-type]
    ]


def models() -> Path:
    return BENCH / "models"


def _engines(dtype: Dtype, threads: int) -> list[Contender]:
    """The last two are left out of the FP32 section: the ledger and the slowest rival are in BF16's."""
    checkpoint = str(models() / f"small-{dtype}")
    ours = [sys.executable, "-m", f"{_DRIVERS}braid", checkpoint, str(threads)]
    vllm = [str(python_of("vllm")), "-m", f"{_DRIVERS}vllm", checkpoint, str(threads)]
    llama = [str(python_of("llamacpp")), "-m", f"{_DRIVERS}llamacpp", f"{checkpoint}.gguf", str(threads)]
    slow = [sys.executable, "-m", f"{_DRIVERS}transformers", checkpoint, str(threads)]
    return [
        Contender(COLOCATED, Command([*ours, "0"]), is_ours=True),
        Contender("llama.cpp", Command(llama), environment="llamacpp"),
        Contender("vLLM", Command(vllm), environment="vllm"),
        Contender(DISAGGREGATED, Command([*ours, "1"]), is_ours=True),
        Contender("transformers", Command(slow), rounds=1, new_tokens=32),
    ]


def _servers(dtype: Dtype, threads: int) -> list[Contender]:
    checkpoint = models() / f"small-{dtype}"
    serve = [str(python_of("vllm")), "-m", f"{_DRIVERS}vllm_server", str(checkpoint), str(threads), "18701"]
    return [
        Contender(COLOCATED, _over_http(18711, checkpoint.name, _braid_up("colocated", checkpoint, 18711)), True),
        Contender("vLLM", _over_http(18701, checkpoint.name, serve), environment="vllm"),
        Contender(
            DISAGGREGATED, _over_http(18721, checkpoint.name, _braid_up("disaggregated", checkpoint, 18721)), True
        ),
    ]


def _over_http(port: int, model: str, server: Sequence[str]) -> Command:
    driver = [sys.executable, "-m", f"{_DRIVERS}http", str(port), str(READY_TIMEOUT_S), model]
    return Command([*driver, *server])


def _braid_up(layout: str, checkpoint: Path, port: int) -> list[str]:
    command = [str(Path(sys.executable).parent / "braid"), "up", str(CLUSTERS / f"{layout}.yaml")]
    ports = ["--http-port", str(port), "--grpc-port", str(port + 1)]
    return [*command, "--name", f"bench-{layout}", "--model", str(checkpoint), *ports]
