"""A real cluster, started and stopped with the `braid` command as a user would, for tests of the cluster room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import openai
from waiting import LIMIT_S, until

from braid.cluster import braid_v1_pb2 as pb
from braid.cluster import braid_v1_pb2_grpc
from braid.cluster.ports import free_ports
from braid.cluster.registry import Registry
from braid.cluster.status import status

BRAID = Path(sys.executable).parent / "braid"


def run_braid(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Never in the repository root: Ray would put our `kernels/` before the Hugging Face package of that name."""
    command = [str(BRAID), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=LIMIT_S
    )


class RunningCluster:
    """Inside `with` it is up and both front ends answer; afterwards it is down, whatever the tests have done to it."""

    def __init__(self, name: str, cwd: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.name, self.cwd, self.arguments = name, cwd, arguments
        self.env = {"HOME": str(cwd)} | (env or {})  # a registry of its own: the user's clusters are none of ours
        self.registry = Registry(cwd / ".cache" / "braid")
        self.http_port, self.grpc_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")
        self.stub = braid_v1_pb2_grpc.BraidStub(self.channel)

    def __enter__(self) -> RunningCluster:
        ports = ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        command = ["up", *self.arguments, "--name", self.name, "--detach", *ports]
        try:
            done = run_braid(*command, cwd=self.cwd, env=self.env)
            assert done.returncode == 0, f"braid up failed:\n{done.stdout}\n{done.stderr}"
            self.model = self.client.models.list().data[0].id
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self.client.close()
        self.channel.close()
        record = self.registry.find(self.name)
        before = processes_with(record.run_dir) if record else []
        done = run_braid("down", "--name", self.name, cwd=self.cwd, env=self.env)
        if failure is None:
            assert done.returncode == 0, done.stderr
            assert record is not None
            assert (bool(before), processes_with(record.run_dir)) == (True, [])

    def status(self) -> dict[str, Any]:
        """What `braid status` shows, without the second its start takes: a request under way may be over by then."""
        return status(self.name, self.registry)

    def worker(self, name: str) -> dict[str, Any]:
        workers: dict[str, dict[str, Any]] = {worker["name"]: worker for worker in self.status()["workers"]}
        return workers[name]

    def wait_status(self, found: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        status: dict[str, Any] = until(lambda: told if found(told := self.status()) else None, what)
        return status

    def wait_baseline(self) -> None:
        """Every live attention worker has all its blocks free and no sequence; the invariant after any test."""

        def is_idle(status: dict[str, Any]) -> bool:
            attention = [w for w in status["workers"] if w["role"] != "expert" and w["state"] == "live"]
            return bool(attention) and all(
                w["free_blocks"] == w["total_blocks"] and not w["sequences"] for w in attention
            )

        self.wait_status(is_idle, "the last block to be free, and the last sequence to be gone")

    def generate(self, prompt: list[int], **sampling: Any) -> tuple[list[int], str]:
        """Token ids and text over gRPC."""
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(**sampling))
        responses = list(self.stub.Generate(request, timeout=LIMIT_S))
        return [token for r in responses for token in r.token_ids], "".join(r.text for r in responses)


def processes_with(run_dir: str) -> list[str]:
    """Command lines of all processes that have the cluster's run folder in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{run_dir}/".encode() in path.read_bytes():
                found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
