"""What people see: the words of a start and the picture of the expert map."""

from __future__ import annotations

import io
from typing import Any

from braid.cluster.terminal import console_for, describe_start, device_words, expert_picture, render_status


def worker(name: str, state: str = "live", **more: Any) -> dict[str, Any]:
    row = {"name": name, "role": name.split("-")[0], "node": "here", "pid": 7, "incarnation": 1, "state": state}
    row |= {"sequences": 0, "waiting": 0, "free_blocks": None, "total_blocks": None, "experts": None, "tokens": 3}
    return row | {"hops": 4, "loading": {}} | more


def status(*workers: dict[str, Any], replicas: list[int]) -> dict[str, Any]:
    return {
        "name": "one",
        "state": "degraded",
        "problems": ["expert-1 is lost: [died]"],
        "model": {"name": "tiny", "architecture": "DeepseekV3ForCausalLM", "path": "/m", "notices": ["mind the terms"]},
        "endpoints": {"http": "http://127.0.0.1:8000", "grpc": "127.0.0.1:9000"},
        "epoch": 2,
        "workers": list(workers),
        "expert_map": {"epoch": 2, "layers": [1, 2], "replicas": replicas},
        "load": {"sequences": 1, "waiting": 0, "free_blocks": 3, "total_blocks": 4, "prefix_hit_rate": 0.25},
    }


def test_the_start_in_words() -> None:
    assert describe_start({"doing": "starting Ray"}) == ("starting Ray", 0, 0)
    loading = {"phase": "loading", "done_bytes": 1, "total_bytes": 4}
    workers = [worker("a", "starting", loading=loading), worker("b", "ready", loading=loading | {"phase": "ready"})]
    assert describe_start({"status": {"workers": workers}}) == ("1 of 2 workers ready (loading)", 2, 8)
    workers[0]["state"] = "live"
    assert describe_start({"status": {"workers": workers}})[0].startswith("workers ready")


def test_the_expert_map_as_a_picture() -> None:
    found = status(worker("expert-0", experts=[0, 1, 2]), worker("expert-1", experts=[2, 3]), replicas=[1, 1, 2, 1])
    assert expert_picture(found) == ["  expert-0   ■■■·", "  expert-1   ··■■", "  replicas   1121"]


def test_many_experts_share_cells_and_the_lost_hold_none() -> None:
    first, second = worker("expert-0", experts=list(range(100))), worker("expert-1", "lost", experts=list(range(256)))
    picture = expert_picture(status(first, second, replicas=[1] * 100 + [0] * 156))
    assert picture[0].split()[1] == "■" * 25 + "·" * 39
    assert picture[1].split()[1] == "·" * 64
    assert picture[2].split()[1] == "1" * 25 + "0" * 39


def test_the_whole_status() -> None:
    out = io.StringIO()
    attention = worker("decode-0", free_blocks=3, total_blocks=4)
    console_for(out).print(render_status(status(attention, worker("expert-0", experts=[0]), replicas=[1])))
    told = out.getvalue()
    assert "cluster one is degraded" in told
    assert "! expert-1 is lost: [died]" in told
    assert "mind the terms" in told
    assert "3/4" in told
    assert "load: 1 sequences, 0 waiting, 1/4 KV blocks, 25% of prompt tokens found in the cache" in told


def test_a_gpu_and_how_full_it_is() -> None:
    row = worker("decode-0", device="NVIDIA H100 80GB HBM3", device_memory_used=9 << 30, device_memory=20 << 30)
    assert device_words(row) == "H100 80GB HBM3, 9/20 GiB"
    assert device_words(worker("decode-0", device="CPU")) == "CPU"
    assert device_words(worker("decode-0")) == ""
