"""Whole GPU workers in processes, kernels interpreted: the same tokens whichever way rows go, and through a death."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import interpreted_gpu
import processes
import pytest
from generators import make_hf_model, save_hf_model
from processes import ProcessCluster

from braid.model.sampling_params import SamplingParams

PROMPTS = [[3, 5, 7], [9, 4]]
EXPERTS = ["expert-0", "expert-1"]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = make_hf_model("v3", num_hidden_layers=2, num_experts_per_tok=2)
    path: Path = save_hf_model(model, tmp_path_factory.mktemp("checkpoint"))
    return path


@contextmanager
def cluster(checkpoint: Path, run_dir: Path, gpus: float) -> Iterator[ProcessCluster]:
    run_dir.mkdir()
    made = ProcessCluster(checkpoint, run_dir, prefill=0, dtype="auto", gpus=gpus, kv_tokens=1024, max_batch_tokens=16)
    yield made
    made.front.wait_baseline()
    made.close()


def tokens(made: ProcessCluster) -> list[list[int]]:
    return [answer.token_ids for answer in made.generate(PROMPTS, GREEDY)]


def over_links(made: ProcessCluster, expert: str) -> int:
    """Rows that have left over links: those by mail are not counted under this name."""
    rows: int = made.workers[expert].call("status").get("rows", 0)
    return rows


def test_rows_by_mail_or_through_host_memory_and_a_death(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_answer_calls", interpreted_gpu.answer_calls)
    with cluster(checkpoint, tmp_path / "shares", gpus=0.25) as shares:
        expected = tokens(shares)
        assert sum(over_links(shares, name) for name in EXPERTS) > 0
    with cluster(checkpoint, tmp_path / "whole", gpus=1) as whole:
        before: list[int] = []
        while before != (before := [over_links(whole, name) for name in EXPERTS]):  # until all have a mailbox
            assert tokens(whole) == expected
        whole.submit("struck", PROMPTS[0], GREEDY)
        struck = whole.front.answers["struck"]
        whole.front.wait(lambda: len(struck.tokens) > 1, "the first tokens")
        whole.workers[EXPERTS[0]].kill()
        whole.front.finish("struck")
        assert struck.token_ids == expected[0]
        assert over_links(whole, EXPERTS[1]) == before[1]
