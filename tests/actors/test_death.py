"""What one death costs: nothing where a replica is left; else a clear error for exactly the requests it concerns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from generators import make_hf_model, save_hf_model
from processes import ProcessCluster

from braid.model.sampling_params import SamplingParams

PROMPT = [(5 * j) % 150 + 3 for j in range(40)]
LONG = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)  # some minutes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = make_hf_model("v3", seed=11)
    path: Path = save_hf_model(model, tmp_path_factory.mktemp("checkpoint"))
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 131_072}))
    return path


def started(cluster: ProcessCluster, name: str, params: SamplingParams = LONG, **where: str) -> None:
    """A long request with a few tokens out."""
    cluster.submit(name, PROMPT, params, **where)
    cluster.front.wait(lambda: len(cluster.front.answers[name].tokens) > 3, "the first tokens")


def test_an_expert_workers_death_changes_no_token(checkpoint: Path, tmp_path: Path) -> None:
    cluster = ProcessCluster(checkpoint, tmp_path, kv_tokens=4096)
    (undisturbed,) = cluster.generate([PROMPT], LONG)
    started(cluster, "struck")
    cluster.workers["expert-0"].kill()
    cluster.front.finish("struck")
    assert cluster.front.answers["struck"].error is None
    assert cluster.front.answers["struck"].token_ids == undisturbed.token_ids
    cluster.front.wait_baseline()
    cluster.close()


def test_a_map_that_names_a_wrong_holder_costs_a_second_hop_and_no_token(checkpoint: Path, tmp_path: Path) -> None:
    cluster = ProcessCluster(checkpoint, tmp_path, replicas=1, claimed_replicas=2, kv_tokens=4096)
    (answer,) = cluster.generate([PROMPT], LONG)
    cluster.front.wait_baseline()
    assert answer.error is None
    assert cluster.front.loads["decode-0"]["counters"]["dispatch_resent"] > 0
    cluster.close()
    colocated = ProcessCluster(checkpoint, tmp_path, experts="colocated", kv_tokens=4096)
    assert colocated.generate([PROMPT], LONG)[0].token_ids == answer.token_ids
    colocated.close()


def test_the_last_replicas_death_is_a_clear_error_and_the_worker_lives_on(checkpoint: Path, tmp_path: Path) -> None:
    cluster = ProcessCluster(checkpoint, tmp_path, experts=2, replicas=1, kv_tokens=131_072)
    started(cluster, "struck", ENDLESS)  # whatever holds us up now, it is under way when an expert worker dies
    cluster.workers["expert-1"].kill()
    cluster.front.finish("struck")
    error = cluster.front.answers["struck"].error
    assert error is not None
    assert error["code"] == "unavailable"
    assert "no live replica of expert" in error["message"]
    cluster.front.wait_baseline()
    assert cluster.workers["decode-0"].call("status")["sequences"] == 0
    cluster.close()


def test_a_decode_workers_death_ends_its_requests_and_no_other(checkpoint: Path, tmp_path: Path) -> None:
    cluster = ProcessCluster(checkpoint, tmp_path, decode=2, kv_tokens=4096)
    (undisturbed,) = cluster.generate([PROMPT], LONG)
    started(cluster, "doomed", decode="decode-1")
    started(cluster, "spared", decode="decode-0")
    cluster.workers["decode-1"].kill()
    cluster.front.wait(lambda: "decode-1" not in cluster.front.links, "the death of decode-1")
    cluster.front.finish("spared")
    assert cluster.front.answers["spared"].token_ids == undisturbed.token_ids
    # a prompt bound for the dead worker is refused by name, at once
    cluster.submit("too late", PROMPT, LONG, decode="decode-1")
    cluster.front.finish("too late")
    error = cluster.front.answers["too late"].error
    assert error is not None
    assert "decode-1" in error["message"]
    cluster.front.wait_baseline()
    cluster.close()


def test_a_front_ends_death_frees_what_it_had_running(checkpoint: Path, tmp_path: Path) -> None:
    cluster = ProcessCluster(checkpoint, tmp_path, kv_tokens=4096)
    started(cluster, "orphan")
    front = cluster.front
    front.close()  # every link closes, as the kernel does for a killed process
    cluster.front = type(front)("front-1")
    for info in cluster.view.workers:
        if info.role != "expert":
            cluster.front.connect(info)
    cluster.front.wait(lambda: len(cluster.front.loads) == 2, "load reports")
    cluster.front.wait_baseline()
    cluster.close()
