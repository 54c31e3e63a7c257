"""A real cluster, started and stopped with the `braid` command as a user would, for tests of the cluster room."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import openai

from braid.cluster import braid_v1_pb2 as pb
from braid.cluster import braid_v1_pb2_grpc

BRAID = Path(sys.executable).parent / "braid"
UP_TIMEOUT_S = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_braid(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Never in the repository root: Ray would put our `kernels/` before the Hugging Face package of that name."""
    command = [str(BRAID), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=UP_TIMEOUT_S
    )


class RunningCluster:
    """`up` has returned: both front ends answer."""

    def __init__(self, name: str, cwd: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.name, self.cwd, self.env = name, cwd, env
        self.http_port, self.grpc_port = free_port(), free_port()
        ports = ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        done = run_braid("up", *arguments, "--name", name, "--detach", *ports, cwd=cwd, env=env)
        assert done.returncode == 0, f"braid up failed:\n{done.stdout}\n{done.stderr}"
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")
        self.stub = braid_v1_pb2_grpc.BraidStub(self.channel)
        self.model = self.client.models.list().data[0].id

    def status(self) -> dict[str, Any]:
        done = run_braid("status", "--name", self.name, "--json", cwd=self.cwd)
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def worker(self, name: str) -> dict[str, Any]:
        workers: dict[str, dict[str, Any]] = {worker["name"]: worker for worker in self.status()["workers"]}
        return workers[name]

    def wait_baseline(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Every live attention worker has all its blocks free and no sequence; the invariant after any test."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            attention = [w for w in status["workers"] if w["role"] != "expert" and w["state"] == "live"]
            if attention and all(w["free_blocks"] == w["total_blocks"] and not w["sequences"] for w in attention):
                return status
            assert time.monotonic() < deadline, f"blocks or sequences are left: {attention}"

    def generate(self, prompt: list[int], **sampling: Any) -> tuple[list[int], str]:
        """Token ids and text over gRPC."""
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(**sampling))
        responses = list(self.stub.Generate(request, timeout=120))
        return [token for r in responses for token in r.token_ids], "".join(r.text for r in responses)

    def down(self) -> None:
        self.client.close()
        self.channel.close()
        done = run_braid("down", "--name", self.name, cwd=self.cwd)
        assert done.returncode == 0, done.stderr


def processes_of(cluster_name: str) -> list[str]:
    """Command lines of every process that was started with the cluster's run folder or name in its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"/{cluster_name}/".encode() in path.read_bytes():
                found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
