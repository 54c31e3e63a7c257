"""A running cluster loses its workers one by one, by SIGKILL: each loss costs what the README says and no more."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from running_cluster import RunningCluster
from waiting import LIMIT_S, until

from braid.cluster import braid_v1_pb2 as pb

pytestmark = pytest.mark.cluster

PROMPT = list(range(40, 120))
NUM_TOKENS = 200
ENDLESS = 4000  # as many as the context holds: still under way when its worker is killed, however late we are to do so


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RunningCluster]:
    with RunningCluster("losses", tmp_path, "--decode", "2") as running:
        yield running


class Stream:
    """One request under way: made once tokens flow."""

    def __init__(self, cluster: RunningCluster, max_tokens: int = NUM_TOKENS) -> None:
        sampling = pb.Sampling(max_tokens=max_tokens, temperature=0.8, seed=11, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)
        self._responses = cluster.stub.Generate(request, timeout=LIMIT_S)
        self.tokens: list[int] = []
        self.read_to(5)

    def read_to(self, count: int) -> None:
        while len(self.tokens) < count:
            self.tokens += next(self._responses).token_ids

    def finish(self) -> list[int]:
        """The first tokens, which are those that are compared; an endless stream ends with them."""
        self.read_to(NUM_TOKENS)
        self._responses.cancel()
        return self.tokens[:NUM_TOKENS]


def first_to_break(streams: Sequence[Stream]) -> tuple[Stream, Any]:
    """Reads all of them in turns, so that none ends before; the one that breaks, and its error."""
    for stream in cycle(streams):
        try:
            stream.read_to(len(stream.tokens) + 1)
        except grpc.RpcError as error:
            return stream, error
    raise AssertionError("there are no streams")


def kill(worker: dict[str, Any]) -> None:
    """At once, so that a stream under way is still so: who has to look the process up comes too late."""
    os.kill(worker["pid"], signal.SIGKILL)


def test_a_cluster_loses_its_workers_one_by_one(cluster: RunningCluster) -> None:
    workers = {worker["name"]: worker for worker in cluster.status()["workers"]}
    undisturbed = Stream(cluster).finish()

    # an expert worker: its replica takes over and no token changes
    struck = Stream(cluster)
    kill(workers["expert-1"])
    assert struck.finish() == undisturbed
    status = cluster.wait_status(lambda status: status["expert_map"]["epoch"] == 2, "the map without expert-1")
    assert {worker["name"]: worker["state"] for worker in status["workers"]}["expert-1"] == "lost"
    assert Stream(cluster).finish() == undisturbed

    # a decode worker: its own streams end by name, the other worker's go on
    streams = [Stream(cluster, ENDLESS), Stream(cluster, ENDLESS)]
    kill(workers["decode-1"])
    struck, error = first_to_break(streams)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "decode-1" in str(error.details())
    (spared,) = [stream for stream in streams if stream is not struck]
    assert spared.finish() == undisturbed
    assert Stream(cluster).finish() == undisturbed
    cluster.wait_baseline()

    # the only prefill worker: new requests are refused at once, and health says so
    kill(workers["prefill-0"])
    until(lambda: httpx.get(f"{cluster.url}/health", timeout=LIMIT_S).status_code == 503, "health to see the loss")
    body = {"model": cluster.model, "prompt": "x"}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=LIMIT_S)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"]
