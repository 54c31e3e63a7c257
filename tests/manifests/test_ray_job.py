"""The commands of docs/ray-job.md against a real job server: the wheel travels, the cluster serves, nothing is left."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from ray_head import RayHead
from waiting import LIMIT_S, until

from braid.cluster.ports import free_ports

NAME = "as-job"
SPEC = """
name: {name}
front_end: {{http_port: {http}, grpc_port: {grpc}}}
"""


@pytest.mark.cluster
def test_a_job_starts_the_cluster_and_keeps_it_until_stopped(head: RayHead, wheel: Path) -> None:
    http_port, grpc_port = free_ports(2)
    spec = SPEC.format(name=NAME, http=http_port, grpc=grpc_port)
    with (
        head.lent_to(NAME),
        OpenAI(base_url=f"http://127.0.0.1:{http_port}/v1", api_key="none", max_retries=0) as client,
    ):
        submit(head, NAME, spec, wheel, "python", "-m", "braid.cluster.cli", "up", "braid.yaml", "--address", "auto")
        until(lambda: serves(head, client), "the cluster to serve")
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
        until(lambda: not head.living_actors(f"braid-{NAME}"), "the end of the actors")
        _, alive = psutil.wait_procs(processes, timeout=LIMIT_S)
        assert alive == []
        until(lambda: not any(listens(port) for port in (http_port, grpc_port)), "the end of both servers")


@pytest.mark.cluster
def test_an_unpacked_wheel_travels_too_and_a_bad_spec_fails_the_job(head: RayHead, wheel: Path) -> None:
    unpacked = head.folder / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    code = "from braid.cluster import cli; print(cli.__file__); raise SystemExit(cli.main(['up', 'braid.yaml']))"
    submit(head, "bad", "ray_address: auto\nprefil: {workers: 2}\n", unpacked / "braid", "python", "-c", code)
    job = until(lambda: ended(head, "bad"), "the end of the job")
    logs = head.ask("/api/jobs/bad/logs")["logs"]
    assert job["status"] == "FAILED"
    assert "/py_modules_files/" in logs
    assert "unknown setting 'prefil'; did you mean 'prefill'?" in logs


def submit(head: RayHead, name: str, spec: str, module: Path, *entrypoint: str) -> None:
    folder = head.folder / name
    folder.mkdir()
    (folder / "braid.yaml").write_text(spec)
    command = ["ray", "job", "submit", "--address", head.dashboard, "--submission-id", name, "--no-wait"]
    command += ["--working-dir", str(folder), "--runtime-env-json", json.dumps({"py_modules": [str(module)]})]
    head.command(*command, "--", *entrypoint)


def ended(head: RayHead, name: str) -> Any:
    job = head.ask(f"/api/jobs/{name}")
    return job if job["status"] in ("FAILED", "STOPPED", "SUCCEEDED") else None


def serves(head: RayHead, client: OpenAI) -> bool:
    if job := ended(head, NAME):
        raise AssertionError(f"{job['message']}\n{head.ask(f'/api/jobs/{NAME}/logs')['logs']}")
    address = str(client.base_url).removesuffix("/v1/")
    try:
        return httpx.get(f"{address}/health", timeout=LIMIT_S).status_code == 200
    except httpx.TransportError:
        return False


def listens(port: int) -> bool:
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return any(each.laddr and each.laddr.port == port for each in listening)
