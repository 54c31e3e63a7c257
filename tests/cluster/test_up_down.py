"""`braid up` and `braid down` for real: side by side, in the foreground, after a crash, and when a start fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running_cluster import BRAID, run_braid
from waiting import LIMIT_S, until

from braid.cluster.ports import free_ports
from braid.cluster.processes import Process, members, process_of, wait_gone
from braid.cluster.registry import Registry

SMALL = ("--prefill", "0", "--experts", "colocated")


class Home:
    """A home directory of its own: its registry is not that of whoever runs the tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = Registry(path / ".cache" / "braid")

    def braid(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = run_braid(*arguments, cwd=self.path, env={"HOME": str(self.path)})
        return done

    @contextmanager
    def foreground(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """`told` is where it tells what it does."""
        command, env = [str(BRAID), "up", *arguments], os.environ | {"HOME": str(self.path)}
        with self.told.open("wb") as told, subprocess.Popen(command, cwd=self.path, env=env, stderr=told) as front:
            try:
                yield front
            finally:
                front.terminate()

    @property
    def told(self) -> Path:
        return self.path / "told"

    def supervisor(self, name: str) -> Process:
        found = self.registry.get(name).supervisor
        assert found is not None
        return found

    def status(self, name: str) -> dict[str, Any]:
        done = self.braid("status", "--name", name, "--json")
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    for record in home.registry.all():
        home.braid("down", "--name", record.name)


def ports(http: int, grpc: int) -> list[str]:
    return ["--http-port", str(http), "--grpc-port", str(grpc)]


def is_healthy(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=LIMIT_S) as answer:
        return bool(answer.status == 200)


@pytest.mark.cluster
def test_two_clusters_side_by_side_end_without_a_trace(home: Home) -> None:
    """One detached, whose supervisor is killed at last; one in the foreground, ended by Ctrl-C."""
    http, grpc, other_http, other_grpc, *spare = free_ports(7)
    up = home.braid("up", "--name", "one", "--detach", *SMALL, *ports(http, grpc))
    assert up.returncode == 0, up.stderr
    assert "cluster one is serving" in up.stderr
    first = home.supervisor("one")
    run_dirs = [Path(home.registry.get("one").run_dir)]
    status = home.status("one")
    assert status["state"] == "serving"
    assert [(w["name"], w["role"], w["state"], w["incarnation"]) for w in status["workers"]] == [
        ("decode-0", "both", "live", 1)
    ]
    assert status["workers"][0]["free_blocks"] == status["workers"][0]["total_blocks"] > 0
    assert status["expert_map"] is None

    again = home.braid("up", "--name", "one", "--detach", *SMALL, *ports(*spare[:2]))
    assert again.returncode == 1
    assert f"cluster 'one' is already up (pid {first.pid}" in again.stderr
    taken = home.braid("up", "--name", "two", "--detach", *SMALL, *ports(http, spare[2]))
    assert taken.returncode == 2
    assert f"front_end.http_port: port {http} on 127.0.0.1 is in use by pid" in taken.stderr

    with home.foreground("--name", "two", *SMALL, *ports(other_http, other_grpc)) as front:
        # not by its status: who is asked to stop before it has heard that the cluster serves has not started it
        until(lambda: b"Ctrl-C stops it" in home.told.read_bytes(), "the second cluster")
        assert is_healthy(other_http)
        assert home.status("two")["state"] == "serving"
        second = home.supervisor("two")
        run_dirs.append(Path(home.registry.get("two").run_dir))
        everybody = members(second)
        assert not set(everybody) & set(members(first))
        front.send_signal(signal.SIGINT)
        assert front.wait(LIMIT_S) == 0
    assert wait_gone(everybody, LIMIT_S) == []
    assert is_healthy(http)

    everybody = members(first)
    assert process_of(status["workers"][0]["pid"]) in everybody
    os.kill(first.pid, signal.SIGKILL)
    assert wait_gone([first], LIMIT_S) == []
    stuck = home.braid("status", "--name", "one")
    assert stuck.returncode == 1
    assert "died without cleaning up: `braid down --name one` sweeps up after it" in stuck.stderr
    down = home.braid("down", "--name", "one")
    assert down.returncode == 0, down.stderr
    assert wait_gone(everybody, 0.0) == []
    assert home.registry.all() == []
    assert not any(run_dir.exists() for run_dir in run_dirs)
    assert not (home.path / ".ray").exists(), "Ray's token belongs in the run folder"
    once_more = home.braid("down", "--name", "one")
    assert once_more.returncode == 1
    assert "no cluster 'one' was started on this machine" in once_more.stderr


@pytest.mark.cluster
def test_a_start_that_fails_says_why_and_leaves_only_logs(home: Home) -> None:
    spec = home.path / "spec.yaml"
    http, grpc = free_ports(2)
    spec.write_text(
        f"name: three\nprefill: {{workers: 0}}\ndecode: {{workers: 2, strategy: STRICT_SPREAD}}\nexperts: colocated\n"
        f"front_end: {{http_port: {http}, grpc_port: {grpc}}}\n"
    )
    up = home.braid("up", str(spec), "--detach")
    assert up.returncode == 1
    assert "pool decode: 2 x 1 CPU, STRICT_SPREAD: needs 2 different nodes, there are 1" in up.stderr
    assert home.registry.all() == []
    [kept] = (home.path / ".cache" / "braid" / "_logs").iterdir()
    assert f"(logs: {kept})" in up.stderr
    assert (kept / "up.log").exists()
