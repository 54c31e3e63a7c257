"""llama.cpp, through the low-level calls of llama-cpp-python: one llama_decode per step over all sequences.

python -m braid.benchmarks.rivals.llamacpp MODEL.gguf THREADS
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp as lc
import numpy as np

from .session import Answers, Stopwatch, serve, take_stdout

CONTEXT_TOKENS, MAX_BATCH, MICRO_BATCH, MAX_SEQUENCES = 32 * 320, 4096, 512, 33


class LlamaCpp:
    def __init__(self, gguf: str, threads: int) -> None:
        self.version = f"llama-cpp-python {lc.__version__}"
        self._log = lc.llama_log_callback(lambda level, text, user: None)  # kept: C calls it as long as it likes
        lc.llama_log_set(self._log, ctypes.c_void_p(0))
        lc.llama_backend_init()
        model_params = lc.llama_model_default_params()
        model_params.use_mmap = False  # weights resident before the first job, as with the others
        model = lc.llama_model_load_from_file(gguf.encode(), model_params)
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT_TOKENS, MAX_BATCH, MICRO_BATCH
        params.n_seq_max, params.kv_unified = MAX_SEQUENCES, True
        params.n_threads = params.n_threads_batch = threads
        self._context = lc.llama_init_from_model(model, params)
        if not model or not self._context:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        self._vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
        self._memory = lc.llama_get_memory(self._context)
        self._batch = lc.llama_batch_init(MAX_BATCH, 0, 1)

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> Answers:
        lc.llama_memory_clear(self._memory, True)
        clock = Stopwatch()
        answers = Answers([[] for _ in prompts], [[] for _ in prompts])
        at_once = max(1, MAX_BATCH // len(prompts[0]))
        for begin in range(0, len(prompts), at_once):
            self._prefill(answers, clock, prompts, range(begin, min(begin + at_once, len(prompts))))
        for step in range(new_tokens - 1):
            last = [ids[-1] for ids in answers.token_ids]
            rows = [(token, len(prompts[s]) + step, s, True) for s, token in enumerate(last)]
            self._run(answers, clock, rows)
        return answers

    def close(self) -> None:
        lc.llama_free(self._context)

    def _prefill(self, answers: Answers, clock: Stopwatch, prompts: Sequence[list[int]], which: range) -> None:
        rows = [(t, p, s, p == len(prompts[s]) - 1) for s in which for p, t in enumerate(prompts[s])]
        self._run(answers, clock, rows)

    def _run(self, answers: Answers, clock: Stopwatch, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, is_wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        if lc.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        for row, (_, _, sequence, is_wanted) in enumerate(rows):
            if is_wanted:
                answers.token_ids[sequence].append(self._greedy(row))
        now = clock()
        for _, _, sequence, is_wanted in rows:
            if is_wanted:
                answers.times_s[sequence].append(now)

    def _greedy(self, row: int) -> int:
        logits: Any = np.ctypeslib.as_array(lc.llama_get_logits_ith(self._context, row), shape=(self._vocab_size,))
        return int(logits.argmax())


if __name__ == "__main__":
    out = take_stdout()
    serve(LlamaCpp(sys.argv[1], int(sys.argv[2])), out)
