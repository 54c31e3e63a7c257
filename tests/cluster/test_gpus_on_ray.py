"""GPUs that Ray has to give and that are not there: workers are placed on them, and say what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import RayHead, ray_head
from running_cluster import run_braid
from waiting import until

from braid.cluster.ports import free_ports

SPEC = """
prefill: {{workers: 1, gpus: {gpus}}}
decode: {{workers: 1, gpus: {gpus}}}
experts: {{workers: 2, gpus: {gpus}}}
engine: {{kv_tokens: 4096}}
front_end: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(labels="role=head", num_gpus=2) as started:
        yield started


def refusal(head: RayHead, folder: Path, gpus: float, timeout_s: int) -> str:
    """What `braid up` says when the cluster does not come up."""
    http, grpc = free_ports(2)
    (folder / "spec.yaml").write_text(SPEC.format(gpus=gpus, http=http, grpc=grpc))
    arguments = ("up", "spec.yaml", "--detach", "--address", head.gcs, "--timeout", str(timeout_s))
    done = run_braid(*arguments, cwd=folder, env=head.env)
    assert done.returncode == 1, done.stdout + done.stderr
    until(lambda: not head.living_actors("braid-braid"), "the end of the actors")
    until(lambda: not head.living_actors("serve"), "the end of Serve")
    return " ".join(done.stderr.split())


@pytest.mark.cluster
def test_more_gpus_than_there_are_is_said_with_the_remedy(head: RayHead, tmp_path: Path) -> None:
    # first of all: what another cluster has given back may not be free yet, and there are seconds only to find a place
    told = refusal(head, tmp_path, 1, timeout_s=8)
    assert "no place within 8 s for pool expert: 2 x 1 CPU and 1 GPU, PACK: 8 CPU and 2 GPU on 1 fitting nodes" in told
    assert "with a smaller share in gpus several workers use one GPU" in told


@pytest.mark.cluster
def test_a_worker_that_is_given_a_gpu_and_sees_none_says_so_at_once(head: RayHead, tmp_path: Path) -> None:
    told = refusal(head, tmp_path, 0.5, timeout_s=3600)
    assert "gpus is 0.5 and no CUDA device is visible to torch" in told
    assert "or set gpus to 0" in told
