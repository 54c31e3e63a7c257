"""Workers from a spec, and words for why there is no room for them."""

from __future__ import annotations

import pytest

from braid.cluster.errors import SpecError
from braid.cluster.plan import (
    Node,
    PoolPlan,
    Threads,
    WorkerPlan,
    explain_refusal,
    gpus_needed,
    plan_pools,
    threads_per_worker,
)
from braid.cluster.spec import from_dict


def test_names_roles_and_experts() -> None:
    pools = plan_pools(from_dict({"decode": {"workers": 2}, "experts": {"workers": 4}}), 8)
    plans = {plan.name: plan for pool in pools for plan in pool.workers}
    assert list(plans) == ["prefill-0", "decode-0", "decode-1", "expert-0", "expert-1", "expert-2", "expert-3"]
    assert plans["decode-1"].role == "decode"
    assert plans["decode-1"].bundle == 1
    held = [expert for name, plan in plans.items() if name.startswith("expert") for expert in plan.expert_ids or ()]
    assert sorted(held) == sorted(list(range(8)) * 2)


def test_without_prefill_workers_decode_does_both() -> None:
    [pool] = plan_pools(from_dict({"prefill": {"workers": 0}, "experts": "colocated"}), 8)
    assert [plan.role for plan in pool.workers] == ["both"]


def test_more_workers_than_experts() -> None:
    with pytest.raises(SpecError, match="9 workers for 8 experts"):
        plan_pools(from_dict({"experts": {"workers": 9}}), 8)


def test_a_dense_model_wants_colocated() -> None:
    with pytest.raises(SpecError, match="dense"):
        plan_pools(from_dict({}), 0)


def test_threads_share_a_node_with_those_who_compute_at_the_same_time() -> None:
    attention = [WorkerPlan("prefill-0", "prefill", "prefill", 0), WorkerPlan("decode-0", "decode", "decode", 0)]
    more = [*attention, WorkerPlan("decode-1", "decode", "decode", 1)]
    experts = [WorkerPlan(f"expert-{i}", "expert", "expert", i) for i in range(6)]
    node, every = Node("a", "10.0.0.1", 16), attention + experts
    assert threads_per_worker(node, attention[1], every) == Threads(share=2, most=16)
    assert threads_per_worker(node, experts[3], every) == Threads(share=2, most=2)
    assert [threads_per_worker(node, worker, more).most for worker in more] == [16, 8, 8]
    assert threads_per_worker(node, attention[0], attention[:1]) == Threads(share=16, most=16)
    assert threads_per_worker(Node("b", "10.0.0.2", 2), experts[0], every) == Threads(share=1, most=1)


def pool(strategy: str = "PACK", cpus: float = 2.0, **labels: str) -> PoolPlan:
    spec = from_dict({"decode": {"workers": 3, "cpus": cpus, "strategy": strategy, "labels": labels}})
    return next(pool for pool in plan_pools(spec, 8) if pool.name == "decode")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            pool(role="gpu"),
            "labels role=gpu: none of the 2 live nodes carries these labels; they carry a: zone=x; b: none",
        ),
        (pool("STRICT_SPREAD"), "needs 3 different nodes, there are 2; use SPREAD or add nodes"),
        (pool(cpus=9.0), "no node has 9 CPU, the largest has 4; lower decode.cpus"),
        (pool("STRICT_PACK"), "all on one node needs 6 CPU, the largest has 4"),
        (pool(), "6 CPU on 2 fitting nodes, too many of them taken by others"),
    ],
)
def test_a_refusal_in_words(asked: PoolPlan, words: str) -> None:
    nodes = [Node("a", "10.0.0.1", 4, 4.0, {"zone": "x"}), Node("b", "10.0.0.2", 2, 2.0)]
    assert explain_refusal(asked, nodes).endswith(words)


def gpu_pool(gpus: float, strategy: str = "PACK", workers: int = 3) -> PoolPlan:
    decode = {"workers": workers, "gpus": gpus, "strategy": strategy}
    spec = from_dict({"decode": decode, "prefill": {"gpus": gpus}, "experts": "colocated"})
    return next(pool for pool in plan_pools(spec, 8) if pool.name == "decode")


def test_gpus_reach_the_workers_and_their_places() -> None:
    pool = gpu_pool(0.5)
    assert pool.resources == {"CPU": 1.0, "GPU": 0.5}
    assert [plan.gpus for plan in pool.workers] == [0.5] * 3
    [cpu, *_] = plan_pools(from_dict({}), 8)
    assert cpu.resources == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (gpu_pool(1), "3 x 1 CPU and 1 GPU, PACK: needs 3 GPU, the 2 fitting nodes have 1; lower workers or gpus"),
        (gpu_pool(0.5, "STRICT_PACK"), "all on one node needs 1.5 GPU, the largest has 1"),
        (
            gpu_pool(0.25),
            "6 CPU and 1 GPU on 2 fitting nodes, too many of them taken by others; with a smaller share in gpus several"
            " workers use one GPU",
        ),
    ],
)
def test_a_refusal_for_want_of_gpus_in_words(asked: PoolPlan, words: str) -> None:
    nodes = [Node("a", "10.0.0.1", 4, 4.0, gpus=1.0), Node("b", "10.0.0.2", 2, 2.0)]
    assert explain_refusal(asked, nodes).endswith(words)
    assert "start Ray there with --num-gpus" in explain_refusal(asked, nodes[1:])


def test_whole_gpus_of_one_machine() -> None:
    assert gpus_needed([]) == 0
    assert gpus_needed(plan_pools(from_dict({}), 8)) == 0
    assert gpus_needed([gpu_pool(1)]) == 3
    assert gpus_needed([gpu_pool(1 / 3)]) == 1
    assert gpus_needed([gpu_pool(0.75), gpu_pool(0.25)]) == 3, "three shares of 3/4 leave room for three of 1/4"
    assert gpus_needed([gpu_pool(0.6), gpu_pool(0.5)]) == 5
