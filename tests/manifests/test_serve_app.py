"""What KubeRay does with the manifest's Serve configuration, done to a real Ray: the application builds its cluster."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import AuthenticationError, OpenAI
from ray_head import RayHead
from waiting import LIMIT_S, until

from braid.cluster.errors import SpecError
from braid.cluster.ports import free_ports
from braid.cluster.spec import ClusterSpec
from braid.manifests.serve_app import settings_for

MANIFEST = Path(__file__).parents[2] / "manifests" / "rayservice.yaml"
NAME = "as-service"
SPEC = """
name: {name}
prefill: {{labels: {{role: head}}}}
front_end: {{http_port: {http}, grpc_port: {grpc}}}
security: {{secret_file: cluster-secret, api_key_file: api-keys}}
"""


def test_the_secret_must_outlive_the_process() -> None:
    with pytest.raises(SpecError, match=r"security\.secret_file"):
        settings_for(ClusterSpec(), 60.0)


@pytest.mark.cluster
def test_serve_builds_the_application_once_the_workers_serve(head: RayHead) -> None:
    http_port, grpc_port = free_ports(2)
    folder = head.folder / "etc"
    folder.mkdir()
    (folder / "braid.yaml").write_text(SPEC.format(name=NAME, http=http_port, grpc=grpc_port))
    (folder / "cluster-secret").write_text("the secret of a test cluster")
    (folder / "api-keys").write_text("a-key\n")
    config = serve_config(folder, http_port)

    with (
        head.lent_to(NAME),
        OpenAI(base_url=f"http://127.0.0.1:{http_port}/v1", api_key="a-key", max_retries=0) as client,
    ):
        until(lambda: takes(head, config), "Serve to take the configuration")
        until(lambda: runs(head), "Serve to run the application")
        until(lambda: has_routes(http_port), "Serve's proxy to know of it")
        first = complete(client)  # at once: who runs is ready
        with pytest.raises(AuthenticationError):
            complete(client.with_options(api_key="another"))

        # Serve builds again; the cluster that is there is taken as it is, and no worker is another one
        before = {actor["actor_id"] for actor in head.living_actors(f"braid-{NAME}")}
        earlier = replicas(head)
        config["applications"][0]["args"]["start_timeout_s"] = 601
        until(lambda: takes(head, config), "Serve to take the configuration")
        until(lambda: (now := replicas(head)) and not now & earlier, "another replica to take over")
        until(lambda: runs(head), "Serve to run the second application")
        assert complete(client) == first
        assert {actor["actor_id"] for actor in head.living_actors(f"braid-{NAME}")} == before

        head.ask("/api/serve/applications/", "DELETE")
        head.command("braid", "down", "--name", NAME, "--address", head.gcs)
        until(lambda: not head.living_actors(f"braid-{NAME}"), "the end of the actors")


def serve_config(folder: Path, http_port: int) -> dict[str, Any]:
    """The manifest's, with this machine's paths and ports."""
    config: dict[str, Any] = yaml.safe_load(yaml.safe_load(MANIFEST.read_text())["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": http_port}
    config["applications"][0]["args"] = {"spec": str(folder / "braid.yaml"), "start_timeout_s": 600}
    return config


def takes(head: RayHead, config: dict[str, Any]) -> bool:
    """Asked again, as KubeRay does: Serve fails when a proxy takes more than 5 s to start, and starts another one."""
    head.ask("/api/serve/applications/", "PUT", config)
    return True


def runs(head: RayHead) -> bool:
    (application,) = head.ask("/api/serve/applications/")["applications"].values()
    assert application["status"] in ("DEPLOYING", "RUNNING"), application["message"]
    return bool(application["status"] == "RUNNING")


def has_routes(http_port: int) -> bool:
    """The proxy starts and hears of routes on its own; until then it answers 503, or not at all."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/-/routes", timeout=LIMIT_S) as answer:
        return bool(json.loads(answer.read()))


def replicas(head: RayHead) -> set[str]:
    actors = head.living_actors("serve")
    return {actor["actor_id"] for actor in actors if actor["class_name"].startswith("ServeReplica")}


def complete(client: OpenAI) -> str:
    answer = client.completions.create(model="braid-tiny", prompt="def ", max_tokens=8, temperature=0)
    return answer.choices[0].text
