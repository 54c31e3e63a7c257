"""transformers' generate over one static batch.

python -m braid.benchmarks.rivals.transformers MODEL_DIR THREADS
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from .session import Answers, Stopwatch, serve, take_stdout


class Transformers:
    def __init__(self, model: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.version = f"transformers {transformers.__version__}"
        self._torch = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> Answers:
        torch, ticks = self._torch, list[float]()

        def tick(ids: Any, scores: Any, **_: Any) -> Any:
            ticks.append(clock())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        ids = torch.tensor(list(prompts))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
        clock = Stopwatch()
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[tick], **options)
        return Answers(out[:, ids.shape[1] :].tolist(), [list(ticks) for _ in prompts])

    def close(self) -> None:
        pass


if __name__ == "__main__":
    out = take_stdout()
    os.environ["OMP_NUM_THREADS"] = sys.argv[2]
    serve(Transformers(sys.argv[1], int(sys.argv[2])), out)
