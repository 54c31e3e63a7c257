"""Braid's engine alone: the workers of a cluster as plain processes, no Ray, no HTTP, no tokenizer.

    python -m braid.benchmarks.rivals.braid MODEL_DIR THREADS colocated|disaggregated

Colocated is one worker with everything on all threads. Disaggregated is one attention worker and one expert worker, who
talk over shared memory; how the threads are shared out is what `braid up` does on a machine with so many cores.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from braid.model.sampling_params import SamplingParams
from braid.tests.processes import ProcessCluster

from .session import Answers, Stopwatch, serve, take_stdout

JOB_TIMEOUT_S = 1200.0
KV_TOKENS = 32 * 320  # what the rivals are given


class Braid:
    def __init__(self, model: str, run_dir: str, threads: int, experts: Literal[1, "colocated"]) -> None:
        self.version = f"braid {version('braid-serve')}"
        workers = 1 if experts == "colocated" else 2
        self._cluster = ProcessCluster(
            Path(model),
            Path(run_dir),
            prefill=0,
            experts=experts,
            dtype="auto",
            replicas=1,
            threads=max(1, threads // workers),
            max_threads=threads,  # attention and experts wait for one another: see cluster/plan.py
            kv_tokens=KV_TOKENS,
        )
        self._count = 0

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> Answers:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        front, clock = self._cluster.front, Stopwatch()
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            self._count += 1
            times[f"r{self._count}"] = []
            self._cluster.submit(f"r{self._count}", list(prompt), params, timeout_s=JOB_TIMEOUT_S)

        def are_finished() -> bool:
            now = clock()
            for name, seen in times.items():
                seen += [now] * (len(front.answers[name].tokens) - len(seen))
            return all(front.answers[name].finish for name in times)

        front.wait(are_finished, "the answers", JOB_TIMEOUT_S)
        for name in times:
            if front.answers[name].error:
                raise RuntimeError(f"{name}: {front.answers[name].error}")
        return Answers([front.answers.pop(name).token_ids for name in times], list(times.values()))

    def close(self) -> None:
        self._cluster.close()


if __name__ == "__main__":
    out = take_stdout()
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        layout: Literal[1, "colocated"] = "colocated" if sys.argv[3] == "colocated" else 1
        serve(Braid(sys.argv[1], folder, int(sys.argv[2]), layout), out)
