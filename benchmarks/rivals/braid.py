"""Braid's engine alone: the workers of a cluster as plain processes, no Ray, no HTTP, no tokenizer.

    python -m braid.benchmarks.rivals.braid MODEL_DIR THREADS EXPERT_WORKERS [KV_TOKENS]

0 expert workers: colocated, one worker with everything. Else one attention worker, and expert workers that it talks to
over shared memory. Threads are shared out as `braid up` does it on a machine with so many cores.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from braid.model.sampling_params import SamplingParams
from braid.tests.processes import ProcessCluster

from .session import Answers, Stopwatch, serve, take_stdout

JOB_TIMEOUT_S = 1200.0
KV_TOKENS = 32 * 320  # what the rivals are given


class Braid:
    def __init__(self, model: str, run_dir: str, threads: int, expert_workers: int, kv_tokens: int) -> None:
        self.version = f"braid {version('braid-serve')}"
        self._cluster = ProcessCluster(
            Path(model),
            Path(run_dir),
            prefill=0,
            experts=expert_workers or "colocated",
            dtype="auto",
            replicas=1,
            cores=threads,
            kv_tokens=kv_tokens,
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
    model, threads, expert_workers, *kv_tokens = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        limit = int(kv_tokens[0]) if kv_tokens else KV_TOKENS
        serve(Braid(model, folder, int(threads), int(expert_workers), limit), out)
