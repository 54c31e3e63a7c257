"""A real Ray head with dashboard and job server, on ports and with a token of its own, ended by its process id."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from waiting import LIMIT_S, until

from braid.cluster.ports import free_ports

SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class RayHead:
    """`env` is what a user of this Ray has set; `folder` is home and temp folder of everything that runs in it."""

    folder: Path
    env: dict[str, str]
    gcs: str
    dashboard: str

    def ask(self, path: str, method: str = "GET", body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.dashboard + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return json.loads(answer.read() or b"null")

    def command(self, *words: str) -> str:
        """Runs a script of the environment, such as `ray`, as a user of this Ray, outside the working copy."""
        command = [str(SCRIPTS / words[0]), *words[1:]]
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def living_actors(self, namespace: str) -> list[dict[str, Any]]:
        listed = self.ask("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
        return [each for each in listed if each["ray_namespace"] == namespace and each["state"] != "DEAD"]

    @contextmanager
    def lent_to(self, cluster: str) -> Iterator[None]:
        """However the test ends, its cluster and Serve are gone afterwards: the next test finds this Ray empty."""
        namespace = f"braid-{cluster}"
        try:
            yield
        finally:
            self.ask("/api/serve/applications/", "DELETE")
            if self.living_actors(namespace):
                self.command("braid", "down", "--name", cluster, "--address", self.gcs)
            until(lambda: not self.living_actors(namespace), f"the end of {cluster}")
            until(lambda: not self.living_actors("serve"), "the end of Serve")


@contextmanager
def ray_head(labels: str, num_gpus: int = 0) -> Iterator[RayHead]:
    """`num_gpus`: that it believes in; they are nowhere, so that no worker finds one."""
    folder = Path(tempfile.mkdtemp(prefix="bh", dir="/tmp"))  # Ray's socket paths have at most 107 bytes
    gcs, dashboard, agent, agent_grpc, metrics, runtime_env, client = free_ports(7)
    env = {
        **os.environ,
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PIP_NO_DEPS": "1",  # or Ray fetches every dependency of a wheel in py_modules once more
    }
    env.pop("RAY_ADDRESS", None)
    if num_gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(1000 + index) for index in range(num_gpus))
    command = [str(SCRIPTS / "ray"), "start", "--head", "--block", "--include-dashboard=true", "--num-cpus=8"]
    command += [f"--temp-dir={folder}", f"--labels={labels}", "--object-store-memory=100000000"]
    command += [
        f"--num-gpus={num_gpus}",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
    ]
    command += [f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}"]
    command += [f"--runtime-env-agent-port={runtime_env}", f"--ray-client-server-port={client}"]
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    head = RayHead(folder, env, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")

    def answers(path: str) -> bool:
        assert process.poll() is None, f"Ray did not start: {(folder / 'ray.log').read_text()}"
        return head.ask(path) is not None

    try:
        until(lambda: answers("/api/version"), "an answer of Ray's dashboard")
        until(lambda: answers("/api/jobs/"), "an answer of Ray's job server")
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
        ours = [
            each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or [])
        ]
        _, left = psutil.wait_procs(ours, timeout=LIMIT_S)  # Ray's agents follow their parent
        for each in left:
            each.kill()
        shutil.rmtree(folder, ignore_errors=True)
        assert left == [], "processes of this Ray were left"
