"""`braid demo`, which is what `make demo` runs: both ways in, the table, and nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest
from running_cluster import run_braid

from braid.cluster.demo import GRPC_PROMPT, HTTP_PROMPT, demo_spec
from braid.cluster.plan import gpus_needed, plan_pools
from braid.cluster.registry import Registry


@pytest.mark.parametrize(("num_gpus", "each"), [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.5), (4, 1.0), (8, 1.0)])
def test_four_workers_share_the_gpus_there_are(num_gpus: int, each: float) -> None:
    spec = demo_spec(num_gpus)
    assert [pool.gpus for pool in spec.pools.values()] == [each] * 3
    assert gpus_needed(plan_pools(spec, 24)) <= num_gpus


@pytest.mark.cluster
def test_the_demo_streams_both_ways_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_braid("demo", cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert GRPC_PROMPT in done.stdout
    assert HTTP_PROMPT in done.stdout
    rows = [line.split() for line in done.stdout.partition("what ran where")[2].splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 5}
    assert [table[name][0] for name in ("prefill-0", "decode-0", "expert-0", "expert-1")] == [
        "prefill",
        "decode",
        "expert",
        "expert",
    ]
    for name in ("prefill-0", "decode-0", "expert-0", "expert-1"):
        assert int(table[name][2]) > 0, f"{name} computed no token"
        assert int(table[name][3]) > 0, f"{name} took no hop"
    assert "processes ended, none left" in done.stdout
    assert Registry(tmp_path / ".cache" / "braid").all() == []
