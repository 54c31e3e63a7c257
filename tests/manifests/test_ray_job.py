"""The commands of docs/ray-job.md against a real job server: the wheel travels, the cluster serves, nothing is left."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI
from ray_head import RayHead, free_ports, until

NAME = "as-job"
SPEC = """
name: {name}
front_end: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.mark.cluster
def test_a_job_starts_the_cluster_and_keeps_it_until_stopped(head: RayHead, wheel: Path) -> None:
    http_port, grpc_port = free_ports(2)
    folder = head.folder / "spec"
    folder.mkdir()
    (folder / "braid.yaml").write_text(SPEC.format(name=NAME, http=http_port, grpc=grpc_port))
    runtime_env = json.dumps({"py_modules": [str(wheel)]})
    submit = ["ray", "job", "submit", "--address", head.dashboard, "--submission-id", NAME, "--no-wait"]
    submit += ["--working-dir", str(folder), "--runtime-env-json", runtime_env]
    head.command(*submit, "--", "python", "-m", "braid.cluster.cli", "up", "braid.yaml", "--address", "auto")

    client = OpenAI(base_url=f"http://127.0.0.1:{http_port}/v1", api_key="none", max_retries=0)
    until("the cluster serves", lambda: serves(head, client), 150.0)
    answer = client.completions.create(model="braid-tiny", prompt="import ", max_tokens=8, temperature=0)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")

    actors = head.living_actors(f"braid-{NAME}")
    assert {"Controller", "WorkerProcess", "FrontActor"} == {actor["class_name"] for actor in actors}
    processes = [psutil.Process(actor["pid"]) for actor in actors]
    for process in processes:
        assert "py_modules" in process.environ()["PYTHONPATH"].split(os.pathsep)[0], "it imports the wheel"

    head.command("ray", "job", "stop", "--address", head.dashboard, NAME)
    assert head.ask(f"/api/jobs/{NAME}")["status"] == "STOPPED"
    until("the actors are gone", lambda: head.living_actors(f"braid-{NAME}") == [], 60.0)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert not any(listens(port) for port in (http_port, grpc_port))


def serves(head: RayHead, client: OpenAI) -> Any:
    job = head.ask(f"/api/jobs/{NAME}")
    if job["status"] in ("FAILED", "STOPPED", "SUCCEEDED"):
        raise AssertionError(f"{job['message']}\n{head.ask(f'/api/jobs/{NAME}/logs')['logs']}")
    return healthy(str(client.base_url).removesuffix("/v1/"))


def healthy(address: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def listens(port: int) -> bool:
    return any(each.laddr.port == port for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
