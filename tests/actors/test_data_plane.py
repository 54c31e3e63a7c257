"""The whole data plane in real processes, without Ray: same tokens whatever the topology, every block given back.

One checkpoint that no part has seen before, made by transformers; the oracle is transformers itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from generators import make_hf_model, save_hf_model
from processes import Answer, ProcessCluster

from braid.model.sampling_params import SamplingParams

PROMPTS = [
    [(7 * i * j + 3 * i + j) % 150 + 3 for j in range(length)] for i, length in enumerate((1, 5, 63, 64, 65, 130))
]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With more positions than the workers have blocks for."""
    model, _ = make_hf_model("v3", seed=11)
    path: Path = save_hf_model(model, tmp_path_factory.mktemp("checkpoint"))
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 131_072}))
    return path


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> list[list[int]]:
    """Greedy continuations by transformers."""
    model, _ = make_hf_model("v3", seed=11)
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_tokens):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    made = ProcessCluster(checkpoint, tmp_path_factory.mktemp("run"), kv_tokens=4096, max_batch_tokens=48)
    yield made
    made.front.wait_baseline()
    made.close()


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def test_front_ends_hear_of_a_worker_once_it_can_reach_the_experts(cluster: ProcessCluster) -> None:
    epochs = {name: load["counters"]["epoch"] for name, load in cluster.front.first_loads.items()}
    assert epochs == {"prefill-0": 1, "decode-0": 1}


def test_tokens_are_the_oracles_one_by_one_and_all_at_once(cluster: ProcessCluster, oracle: list[list[int]]) -> None:
    alone = [cluster.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    assert alone == oracle
    together = cluster.generate(PROMPTS, GREEDY)
    assert tokens(together) == oracle
    assert {answer.finish for answer in together} == {"length"}


def test_sampled_tokens_and_logprobs_do_not_depend_on_company(cluster: ProcessCluster) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.9, seed=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (alone,) = cluster.generate([PROMPTS[4]], params)
    together = cluster.generate([PROMPTS[5], PROMPTS[4], PROMPTS[2]], params)[1]
    assert alone.token_ids == together.token_ids
    assert alone.logprobs == together.logprobs  # bitwise: the same bits whatever the batch
    assert alone.prompt_logprobs == together.prompt_logprobs
    assert len(alone.prompt_logprobs) == len(PROMPTS[4])
    assert alone.prompt_logprobs[0] is None


def test_a_single_token_and_a_scored_prompt_need_no_decode_worker(
    cluster: ProcessCluster, oracle: list[list[int]]
) -> None:
    (one,) = cluster.generate([PROMPTS[2]], SamplingParams(max_tokens=1, temperature=0.0))
    assert (one.token_ids, one.finish) == (oracle[2][:1], "length")
    (scored,) = cluster.generate([PROMPTS[2]], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (scored.token_ids, scored.finish, len(scored.prompt_logprobs)) == ([], "length", len(PROMPTS[2]))


def test_a_stop_token_ends_the_sequence_and_min_tokens_bans_it(
    cluster: ProcessCluster, oracle: list[list[int]]
) -> None:
    stop = oracle[3][4]
    first = oracle[3].index(stop)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    (stopped,) = cluster.generate([PROMPTS[3]], params)
    assert (stopped.token_ids, stopped.finish) == (oracle[3][: first + 1], "stop")
    held = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,), min_tokens=12)
    assert stop not in cluster.generate([PROMPTS[3]], held)[0].token_ids


def test_a_cancel_frees_every_block(cluster: ProcessCluster) -> None:
    front = cluster.front
    cluster.submit("endless", PROMPTS[5], SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True))
    front.wait(lambda: len(front.answers["endless"].tokens) > 3, "some tokens")
    front.cancel("endless")
    front.wait_baseline()
    cluster.submit("early", PROMPTS[5], GREEDY)
    front.cancel("early")
    front.wait_baseline()


def test_a_deadline_ends_the_sequence_with_its_reason(cluster: ProcessCluster) -> None:
    endless = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
    cluster.submit("late", PROMPTS[1], endless, timeout_s=0.1)
    cluster.front.finish("late")
    answer = cluster.front.answers["late"]
    assert answer.error is not None
    assert answer.error["code"] == "deadline"
    cluster.front.wait_baseline()


def test_what_can_never_fit_is_refused_at_once(cluster: ProcessCluster) -> None:
    (answer,) = cluster.generate([[5] * 100], SamplingParams(max_tokens=100_000, temperature=0.0))
    assert answer.error is not None
    assert answer.error["code"] == "busy"
    assert "decode-0" in answer.error["message"]


@pytest.mark.parametrize("shape", ["colocated", "both", "tcp"])
def test_other_topologies_give_the_same_bits(
    shape: str, checkpoint: Path, cluster: ProcessCluster, tmp_path: Path
) -> None:
    """Colocated experts, one worker for both phases with three expert workers, and TCP links."""
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=3, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    expected = cluster.generate(PROMPTS[2:5], params)
    other = {
        "colocated": lambda: ProcessCluster(checkpoint, tmp_path, experts="colocated", kv_tokens=4096),
        "both": lambda: ProcessCluster(checkpoint, tmp_path, prefill=0, experts=3, replicas=1, kv_tokens=4096),
        "tcp": lambda: ProcessCluster(
            checkpoint, tmp_path, experts=1, transport="tcp", kv_tokens=4096, kv_checksums=True
        ),
    }[shape]()
    answers = other.generate(PROMPTS[2:5], params)
    other.front.wait_baseline()
    other.close()
    for mine, theirs in zip(answers, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == theirs.logprobs
        assert mine.prompt_logprobs == theirs.prompt_logprobs


def test_bfloat16_gives_the_same_bits_colocated_and_not(checkpoint: Path, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=3, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    told = []
    for experts in ("colocated", 2):
        made = ProcessCluster(checkpoint, tmp_path, experts=experts, dtype="bfloat16", kv_tokens=4096)
        answers = made.generate(PROMPTS[2:5], params)
        made.front.wait_baseline()
        made.close()
        told.append([(answer.token_ids, answer.logprobs, answer.prompt_logprobs) for answer in answers])
    assert told[0] == told[1]
