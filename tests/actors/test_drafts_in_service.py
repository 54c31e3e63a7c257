"""The bundled model in real processes: with drafts the same bits as without, wherever they run and whoever dies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import Answer, ProcessCluster

import braid
from braid.actors.settings import Dtype
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

BUNDLED = Path(braid.__file__).parent / "model" / "bundled"
TEXTS = (
    "class Stack:\n    def __init__(self):\n        self.",
    "import os\n\ndef read_file(path):",
    "for i in range(10):",
)
GREEDY = SamplingParams(max_tokens=60, temperature=0.0, logprobs=1)
SAMPLED = SamplingParams(max_tokens=47, temperature=1.0, seed=11, logprobs=2, min_tokens=20)
FILTERED = SamplingParams(max_tokens=60, temperature=0.8, top_p=0.9, seed=5, stop_token_ids=tuple(range(300, 340)))


def prompts() -> list[list[int]]:
    """Short ones, and one of three chunks."""
    tokenizer = Tokenizer(BUNDLED)
    short = [list(tokenizer.encode(text)) for text in TEXTS]
    return [*short, (short[0] + short[1]) * 6]


def told(answers: list[Answer]) -> list[Any]:
    return [(answer.token_ids, answer.logprobs, answer.finish, answer.error) for answer in answers]


def everything(cluster: ProcessCluster) -> list[Any]:
    return [told(cluster.generate(prompts(), params)) for params in (GREEDY, SAMPLED, FILTERED)]


def closed(cluster: ProcessCluster) -> dict[str, float]:
    """Counters of the decode worker once every block is free again."""
    cluster.front.wait_baseline()
    counters: dict[str, float] = cluster.front.loads["decode-0"]["counters"]
    cluster.close()
    return counters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_change_no_token_and_no_logprob(dtype: Dtype, tmp_path: Path) -> None:
    limits = {"dtype": dtype, "kv_tokens": 4096, "max_batch_tokens": 70}
    plain = ProcessCluster(BUNDLED, tmp_path, prefill=0, experts="colocated", speculation=False, **limits)
    expected = everything(plain)
    assert {finish for answers in expected for _, _, finish, _ in answers} == {"stop", "length"}
    assert "drafted_tokens" not in closed(plain)

    colocated = ProcessCluster(BUNDLED, tmp_path, prefill=0, experts="colocated", **limits)
    assert everything(colocated) == expected
    assert closed(colocated)["accepted_tokens"] > 0

    disaggregated = ProcessCluster(BUNDLED, tmp_path, experts=2, **limits)
    assert everything(disaggregated) == expected
    assert closed(disaggregated)["accepted_tokens"] > 0


def test_an_expert_workers_death_among_drafts_changes_no_token(tmp_path: Path) -> None:
    params = [replace(GREEDY, max_tokens=120, ignore_eos=True), replace(SAMPLED, max_tokens=120, ignore_eos=True)]
    plain = ProcessCluster(BUNDLED, tmp_path, prefill=0, experts="colocated", speculation=False, kv_tokens=4096)
    expected = [told(plain.generate(prompts(), each)) for each in params]
    closed(plain)
    cluster = ProcessCluster(BUNDLED, tmp_path, experts=2, kv_tokens=8192)
    names = [[f"{place}-{index}" for index in range(len(prompts()))] for place in range(len(params))]
    for place, each in enumerate(params):
        for name, prompt in zip(names[place], prompts(), strict=True):
            cluster.submit(name, prompt, each)
    answers = cluster.front.answers
    cluster.front.wait(lambda: all(len(answer.tokens) > 9 for answer in answers.values()), "tokens of every request")
    cluster.workers["expert-0"].kill()
    cluster.front.finish(*answers)
    assert [told([answers[name] for name in group]) for group in names] == expected
    assert closed(cluster)["drafted_tokens"] > 0


def test_usage_tells_what_became_of_a_requests_drafts(tmp_path: Path) -> None:
    cluster = ProcessCluster(BUNDLED, tmp_path, prefill=0, experts="colocated", kv_tokens=4096)
    (answer,) = cluster.generate(prompts()[:1], GREEDY)
    counters = closed(cluster)
    assert (answer.accepted, answer.rejected) == (
        counters["accepted_tokens"],
        counters["drafted_tokens"] - counters["accepted_tokens"],
    )
    assert 0 < answer.accepted < GREEDY.max_tokens
    assert counters["steps"] <= GREEDY.max_tokens - answer.accepted
