"""vLLM for CPUs, its engine in this process and its scheduler stepped by us.

python -m braid.benchmarks.rivals.vllm MODEL_DIR THREADS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .session import Answers, Stopwatch, serve, take_stdout

MAX_SEQUENCES, MAX_MODEL_LEN, KV_CACHE_GIB = 32, 4096, 1


def environment(threads: int) -> dict[str, str]:
    """vLLM reads these when it is imported."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def dtype_of(model: str) -> str:
    """The checkpoint's own: left to itself, vLLM takes one in float32 for bfloat16."""
    return str(json.loads((Path(model) / "config.json").read_text())["dtype"])


class Vllm:
    def __init__(self, model: str) -> None:
        import vllm

        self.version = f"vLLM {vllm.__version__}"
        self._params = vllm.SamplingParams
        llm = vllm.LLM(
            model,
            dtype=dtype_of(model),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_SEQUENCES,
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
        )
        self._engine: Any = llm.llm_engine
        self._count = 0

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> Answers:
        params = self._params(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        answers = Answers([[] for _ in prompts], [[] for _ in prompts])
        clock = Stopwatch()
        place: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            self._count += 1
            place[str(self._count)] = index
            self._engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = clock()
            for output in outputs:
                index = place[output.request_id.split("-")[0]]
                ids = list(output.outputs[0].token_ids)
                answers.times_s[index] += [now] * (len(ids) - len(answers.token_ids[index]))
                answers.token_ids[index][:] = ids
        return answers

    def close(self) -> None:
        pass


if __name__ == "__main__":
    out = take_stdout()
    os.environ.update(environment(int(sys.argv[2])))
    serve(Vllm(sys.argv[1]), out)
