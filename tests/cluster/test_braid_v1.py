from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from braid.cluster import braid_v1_pb2

MAKE_STUBS = Path(__file__).with_name("make_stubs.py")
CLUSTER = MAKE_STUBS.parents[2] / "cluster"


@pytest.mark.parametrize("name", ["braid_v1_pb2.py", "braid_v1_pb2.pyi", "braid_v1_pb2_grpc.py"])
def test_committed_stubs_are_those_of_the_proto(name: str, made: Path) -> None:
    remedy = "run `python tests/cluster/make_stubs.py`"
    assert (CLUSTER / name).read_text() == (made / name).read_text(), remedy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    subprocess.run([sys.executable, str(MAKE_STUBS), str(out)], check=True)
    return out


def test_sampling_numbers_keep_their_bits_across_protocols() -> None:
    sampling = braid_v1_pb2.Sampling(temperature=0.7, top_p=0.9, min_p=0.05, seed=-(2**63))
    read = braid_v1_pb2.Sampling.FromString(sampling.SerializeToString())
    assert (read.temperature, read.top_p, read.min_p, read.seed) == (0.7, 0.9, 0.05, -(2**63))
