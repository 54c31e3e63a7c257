"""Cached, preempted and replayed in real processes: the same bits as for a request that nothing disturbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generators import make_hf_model, save_hf_model
from processes import Answer, ProcessCluster

import braid
from braid.actors.settings import Dtype
from braid.model.sampling_params import SamplingParams

BUNDLED = Path(braid.__file__).parent / "model" / "bundled"
COMMON = [(11 * i) % 150 + 3 for i in range(200)]
PROMPTS = [[*COMMON[:length], *range(3, 3 + own)] for length, own in ((200, 0), (200, 9), (128, 1), (70, 100))]
LONG = SamplingParams(max_tokens=150, temperature=0.8, seed=9, logprobs=1, ignore_eos=True)
SCORED = SamplingParams(max_tokens=150, temperature=0.8, seed=9, logprobs=1, prompt_logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = make_hf_model("v3", seed=11)
    path: Path = save_hf_model(model, tmp_path_factory.mktemp("checkpoint"))
    return path


def told(answers: list[Answer]) -> list[Any]:
    assert {answer.finish for answer in answers} == {"length"}, answers
    return [(answer.token_ids, answer.logprobs) for answer in answers]


def counters(cluster: ProcessCluster, name: str) -> dict[str, float]:
    found: dict[str, float] = cluster.front.loads[name]["counters"]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_and_preempted_requests_have_the_bits_of_undisturbed_ones(
    dtype: Dtype, checkpoint: Path, tmp_path: Path
) -> None:
    roomy = ProcessCluster(checkpoint, tmp_path, prefill=0, experts="colocated", dtype=dtype, kv_tokens=8192)
    alone = [roomy.generate([prompt], SCORED)[0] for prompt in PROMPTS]  # a scored prompt is never taken from the cache
    assert counters(roomy, "decode-0")["prefix_hit_tokens"] == 0
    cached = told(roomy.generate(PROMPTS, LONG))
    assert counters(roomy, "decode-0")["prefix_hit_tokens"] == 192 + 192 + 128 + 128
    assert [answer.cached for answer in roomy.front.answers.values()][4:] == [192, 192, 128, 128]
    roomy.front.wait_baseline()
    roomy.close()
    assert cached == told(alone)

    for prefill, num_blocks, prompts, expected in (
        (0, 12, [*PROMPTS, *PROMPTS], [*alone, *alone]),
        (1, 15, PROMPTS, alone),
    ):
        tight = ProcessCluster(
            checkpoint, tmp_path, prefill=prefill, experts="colocated", dtype=dtype, kv_tokens=num_blocks * 64
        )
        preempted = tight.generate(prompts, SCORED)
        assert told(preempted) == told(expected)
        assert [answer.prompt_logprobs for answer in preempted] == [answer.prompt_logprobs for answer in expected]
        assert told(tight.generate(PROMPTS, LONG)) == cached
        assert counters(tight, "decode-0")["preemptions"] > 0
        tight.front.wait_baseline()
        tight.close()


def test_drafts_caches_and_preemptions_together_change_nothing(tmp_path: Path) -> None:
    """The bundled model, which drafts: alone without drafts, then all at once with them where there is no room."""
    roomy = ProcessCluster(BUNDLED, tmp_path, prefill=0, experts="colocated", kv_tokens=8192, speculation=False)
    alone = [roomy.generate([prompt], SCORED)[0] for prompt in PROMPTS]
    roomy.close()
    tight = ProcessCluster(BUNDLED, tmp_path, prefill=0, experts="colocated", kv_tokens=12 * 64)
    for params in (SCORED, LONG):
        assert told(tight.generate([*PROMPTS, *PROMPTS], params)) == told([*alone, *alone])
    tight.front.wait_baseline()
    found = counters(tight, "decode-0")
    assert min(found[name] for name in ("preemptions", "evictions", "prefix_hit_tokens", "accepted_tokens")) > 0
    tight.close()
