"""vLLM's own OpenAI server with the settings of our driver of its engine.

python -m braid.benchmarks.rivals.vllm_server MODEL_DIR THREADS PORT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .vllm import MAX_MODEL_LEN, MAX_SEQUENCES, dtype_of, environment


def main() -> None:
    model, threads, port = sys.argv[1:]
    options = ["--served-model-name", Path(model).name, "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    options += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_SEQUENCES), "--dtype", dtype_of(model)]
    options += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    env = os.environ | environment(int(threads)) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # the server's own default
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    os.execve(server[0], server, env)


if __name__ == "__main__":
    main()
