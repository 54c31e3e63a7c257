"""A running cluster loses its workers one by one, by SIGKILL: each loss costs what the README says and no more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from running_cluster import RunningCluster

from braid.cluster import braid_v1_pb2 as pb

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PROMPT = list(range(40, 120))
SAMPLING = pb.Sampling(max_tokens=200, temperature=0.8, seed=11, ignore_eos=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RunningCluster]:
    with RunningCluster("losses", tmp_path, "--decode", "2") as running:
        yield running


class Stream:
    """One request under way: `begin` returns once tokens flow."""

    def __init__(self, cluster: RunningCluster) -> None:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=SAMPLING)
        self._responses = cluster.stub.Generate(request, timeout=90)
        self.tokens: list[int] = []
        while len(self.tokens) < 5:
            self.tokens += next(self._responses).token_ids

    def finish(self) -> list[int]:
        for response in self._responses:
            self.tokens += response.token_ids
        return self.tokens

    def error(self) -> Any:
        """Reads to the end; the error that ended the stream, or None."""
        try:
            self.finish()
        except grpc.RpcError as error:
            return error
        return None


def kill(worker: dict[str, Any]) -> None:
    """At once, so that a stream under way is still so: who has to look the process up comes too late."""
    os.kill(worker["pid"], signal.SIGKILL)


def wait_status(cluster: RunningCluster, until: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    status: dict[str, Any] = cluster.status()
    while not until(status):
        assert time.monotonic() < deadline, f"waited 30 s for {what}: {status}"
        status = cluster.status()
    return status


def test_a_cluster_loses_its_workers_one_by_one(cluster: RunningCluster) -> None:
    workers = {worker["name"]: worker for worker in cluster.status()["workers"]}
    undisturbed = Stream(cluster).finish()

    # an expert worker: its replica takes over and no token changes
    struck = Stream(cluster)
    kill(workers["expert-1"])
    assert struck.finish() == undisturbed
    status = wait_status(cluster, lambda status: status["expert_map"]["epoch"] == 2, "the map without expert-1")
    assert {worker["name"]: worker["state"] for worker in status["workers"]}["expert-1"] == "lost"
    assert Stream(cluster).finish() == undisturbed

    # a decode worker: its own streams end by name, the other worker's go on
    streams = [Stream(cluster), Stream(cluster)]
    kill(workers["decode-1"])
    errors = [stream.error() for stream in streams]
    (spared,) = [stream for stream, error in zip(streams, errors, strict=True) if error is None]
    (error,) = [error for error in errors if error is not None]
    assert spared.tokens == undisturbed
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "decode-1" in str(error.details())
    assert Stream(cluster).finish() == undisturbed
    cluster.wait_baseline()

    # the only prefill worker: new requests are refused at once, and health says so
    kill(workers["prefill-0"])
    deadline = time.monotonic() + 10
    while httpx.get(f"{cluster.url}/health", timeout=10).status_code != 503:
        assert time.monotonic() < deadline, "health never saw the loss of the only prefill worker"
    answer = httpx.post(f"{cluster.url}/v1/completions", json={"model": cluster.model, "prompt": "x"}, timeout=10)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"]
