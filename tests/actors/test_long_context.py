"""32K tokens of context on the bundled model's shape: computed in chunks or found in the cache, the same bits."""

from __future__ import annotations

import json
import random
from pathlib import Path

from processes import ProcessCluster

import braid
from braid.model.kv_cache import BLOCK_SIZE
from braid.model.sampling_params import SamplingParams

CONTEXT = 32 * 1024
BUNDLED = Path(braid.__file__).parent / "model" / "bundled"


def stretched(path: Path) -> Path:
    """The bundled model's first layers with a longer context: what they say is nonsense, and costs what sense would."""
    path.mkdir()
    for file in BUNDLED.iterdir():
        if file.is_file():
            (path / file.name).symlink_to(file)
    config = json.loads((BUNDLED / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_32k_tokens_computed_or_cached_give_the_same_bits(tmp_path: Path) -> None:
    cluster = ProcessCluster(
        stretched(tmp_path / "stretched"), tmp_path, prefill=0, experts="colocated", kv_tokens=CONTEXT + 1024
    )
    draw = random.Random(3)
    prompt = [draw.randrange(3, 4000) for _ in range(CONTEXT - 16)]
    params = SamplingParams(max_tokens=16, temperature=0.5, seed=1, logprobs=2, ignore_eos=True)
    for name in ("computed", "cached"):
        cluster.submit(name, prompt, params)
        cluster.front.wait(lambda name=name: cluster.front.answers[name].finish, "32K tokens")
    computed, cached = (cluster.front.answers[name] for name in ("computed", "cached"))
    assert (computed.cached, cached.cached) == (0, (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE)
    assert computed.finish == cached.finish == "length"
    assert cached.token_ids == computed.token_ids
    assert cached.logprobs == computed.logprobs
    cluster.front.wait_baseline()
    cluster.close()
