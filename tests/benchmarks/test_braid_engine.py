"""Braid's engine alone has the threads that a cluster's workers have on a machine with as many cores."""

from __future__ import annotations

from pathlib import Path

import braid
from braid.benchmarks.rivals.braid import Braid

BUNDLED = Path(braid.__file__).parent / "model" / "bundled"


def test_threads_are_those_of_a_cluster(tmp_path: Path) -> None:
    engine = Braid(str(BUNDLED), str(tmp_path), threads=2, expert_workers=2, kv_tokens=1024)
    workers = {name: worker.settings for name, worker in engine._cluster.workers.items()}
    assert {name: (told.num_threads, told.max_threads) for name, told in workers.items()} == {
        "decode-0": (1, 2),
        "expert-0": (1, 1),
        "expert-1": (1, 1),
    }
    assert len(engine.generate([[5, 6, 7, 8]], 2).token_ids[0]) == 2
    engine.close()
