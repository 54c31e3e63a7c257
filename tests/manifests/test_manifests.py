"""The manifests are rendered, checked field by field, and held against the ClusterSpec they carry."""

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay import check, groups
from ray.serve.schema import ServeDeploySchema

from braid.cluster.spec import ClusterSpec, from_dict, load_spec

MANIFESTS = Path(__file__).parents[2] / "manifests"
DOCS = Path(__file__).parents[2] / "docs" / "kubernetes.md"
KUBERNETES = "1.30"
GPU = "nvidia.com/gpu"


def render(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of the folder; where kubectl is missing, the same without name hashes and image tags."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return list(yaml.safe_load_all(text))
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    rendered = [each for file in plan["resources"] for each in yaml.safe_load_all((folder / file).read_text())]
    spec_folder = folder
    for component in plan.get("components", ()):
        spec_folder = folder / component
        (service,) = of_kind(rendered, "RayService")
        rendered[rendered.index(service)] = patched(service, spec_folder)
    for generator in plan["configMapGenerator"]:
        data = {file: (spec_folder / file).read_text() for file in generator["files"]}
        rendered.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}
        )
    return rendered


def patched(resource: dict[str, Any], component: Path) -> dict[str, Any]:
    """With what the component's patches add."""
    resource = json.loads(json.dumps(resource))  # what YAML aliases share must not be
    for patch in yaml.safe_load((component / "kustomization.yaml").read_text())["patches"]:
        for step in yaml.safe_load((component / patch["path"]).read_text()):
            assert step["op"] == "add"
            *path, last = [key.replace("~1", "/") for key in step["path"].split("/")[1:]]
            place: Any = resource
            for key in path:
                place = place[int(key) if isinstance(place, list) else key]
            place[last] = step["value"]
    return resource


@pytest.fixture(scope="module", params=["CPU", "GPU"])
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param == "CPU":
        return render(MANIFESTS)
    folder = tmp_path_factory.mktemp("gpu") / "manifests"
    shutil.copytree(MANIFESTS, folder)
    file = folder / "kustomization.yaml"
    file.write_text(file.read_text().replace("# components:\n#   - gpu\n", "components:\n  - gpu\n"))
    return render(folder)


@pytest.fixture(scope="module")
def service(rendered: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = of_kind(rendered, "RayService")
    return found


@pytest.fixture(scope="module")
def spec(rendered: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> ClusterSpec:
    """Read as a pod reads it: from the ConfigMap."""
    (config,) = of_kind(rendered, "ConfigMap")
    file = tmp_path_factory.mktemp("spec") / "braid.yaml"
    file.write_text(config["data"]["braid.yaml"])
    return load_spec(file, {})


def of_kind(rendered: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [resource for resource in rendered if resource["kind"] == kind]


def pod(group: dict[str, Any]) -> dict[str, Any]:
    """A group's template with the labels that KubeRay puts on its pods."""
    template = group["template"]
    labels = {**template["metadata"]["labels"], **group["labels"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a-pod", "labels": labels},
        "spec": template["spec"],
    }


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def ports(group: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(group)["ports"]}


def test_core_resources_fit_kubernetes_schemas(rendered: list[dict[str, Any]], service: dict[str, Any]) -> None:
    core = [resource for resource in rendered if not resource["apiVersion"].startswith("ray.io/")]
    kinds = sorted({resource["kind"] for resource in core})
    assert kinds == ["ConfigMap", "NetworkPolicy", "PersistentVolumeClaim", "Service"]
    for resource in [*core, *map(pod, groups(service))]:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


@pytest.mark.parametrize("file", ["rayservice.yaml", "rayjob.yaml"])
def test_ray_resources_use_only_fields_kuberay_knows(file: str) -> None:
    check(yaml.safe_load((MANIFESTS / file).read_text()))


def test_an_unknown_field_would_be_found(service: dict[str, Any]) -> None:
    misspelt = {**service, "spec": {**service["spec"], "serveConfig": "v1"}}
    with pytest.raises(jsonschema.ValidationError, match="serveConfig"):
        check(misspelt)


def test_every_pool_of_the_spec_has_a_group_with_room(service: dict[str, Any], spec: ClusterSpec) -> None:
    for pool in (spec.prefill, spec.decode, spec.experts):
        (group,) = [group for group in groups(service) if group["labels"] == pool.labels]
        cpus = int(container(group)["resources"]["limits"]["cpu"])
        per_pod = 1 if pool.strategy == "STRICT_SPREAD" else cpus // pool.cpus
        if pool.gpus:
            per_pod = min(per_pod, int(container(group)["resources"]["limits"][GPU]) // pool.gpus)
        assert group["replicas"] * per_pod >= pool.workers, group["groupName"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    names = [group["groupName"] for group in groups(service)]
    assert sorted(names) == ["decode", "expert", "head", "prefill"]


def test_gpus_of_the_pods_are_those_that_the_spec_asks_for(service: dict[str, Any], spec: ClusterSpec) -> None:
    for group in groups(service):
        resources = container(group)["resources"]
        counts = {GPU in resources["limits"], GPU in resources["requests"], "tolerations" in group["template"]["spec"]}
        assert counts == {spec.uses_gpus and group["groupName"] != "head"}
    data = spec.to_dict()
    for pool in spec.pools:
        data[pool]["gpus"] = 0.0
    assert from_dict(data) == load_spec(MANIFESTS / "braid.yaml", {}), "but for GPUs the specs are one"


def test_the_head_runs_no_worker_and_answers_clients(service: dict[str, Any], spec: ClusterSpec) -> None:
    head = next(groups(service))
    assert head["rayStartParams"]["num-cpus"] == "0"
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    (http,) = application.deployments
    assert http.ray_actor_options.model_dump(exclude_unset=True) == {"num_cpus": 0, "label_selector": head["labels"]}
    assert (config.http_options.host, config.http_options.port) == (spec.front_end.host, spec.front_end.http_port)


def test_ports_agree(rendered: list[dict[str, Any]], service: dict[str, Any], spec: ClusterSpec) -> None:
    front = spec.front_end
    assert front.host == "0.0.0.0"
    head = next(groups(service))
    assert (ports(head)["serve"], ports(head)["serve-grpc"]) == (front.http_port, front.grpc_port)
    (entry,) = of_kind(rendered, "Service")
    assert {port["port"]: ports(head)[port["targetPort"]] for port in entry["spec"]["ports"]} == {
        front.http_port: front.http_port,
        front.grpc_port: front.grpc_port,
    }
    (public,) = [
        rule
        for policy in of_kind(rendered, "NetworkPolicy")
        for rule in policy["spec"]["ingress"]
        if "from" not in rule
    ]
    assert {port["port"] for port in public["ports"]} == {front.http_port, front.grpc_port}


def test_selectors_find_pods(rendered: list[dict[str, Any]], service: dict[str, Any]) -> None:
    labels = {group["groupName"]: pod(group)["metadata"]["labels"] for group in groups(service)}
    (entry,) = of_kind(rendered, "Service")
    by_kuberay = {"ray.io/serve": "true"}
    found = [name for name, has in labels.items() if entry["spec"]["selector"].items() <= (has | by_kuberay).items()]
    assert found == ["head"]
    for policy in of_kind(rendered, "NetworkPolicy"):
        wanted = policy["spec"]["podSelector"]["matchLabels"].items()
        found = [name for name, has in labels.items() if wanted <= has.items()]
        assert found == (["head"] if policy["metadata"]["name"] == "braid-front-ends" else list(labels))


def test_everything_referred_to_exists(rendered: list[dict[str, Any]], service: dict[str, Any]) -> None:
    names = {
        kind: {each["metadata"]["name"] for each in of_kind(rendered, kind)}
        for kind in ("ConfigMap", "PersistentVolumeClaim")
    }
    for group in groups(service):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container(group)["volumeMounts"]} == set(volumes)
        assert volumes["spec"]["configMap"]["name"] in names["ConfigMap"]
        assert volumes["weights"]["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
        assert f"create secret generic {volumes['secret']['secret']['secretName']} " in DOCS.read_text()


def test_paths_of_the_spec_are_mounted(service: dict[str, Any], spec: ClusterSpec) -> None:
    security = spec.security
    wanted = [spec.model.path, security.secret_file, security.api_key_file]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    wanted.append(config["applications"][0]["args"]["spec"])
    for group in groups(service):
        mounts = [Path(mount["mountPath"]) for mount in container(group)["volumeMounts"]]
        for path in wanted:
            assert path is not None
            assert any(Path(path).is_relative_to(mount) for mount in mounts), path
        assert all(mount["readOnly"] for mount in container(group)["volumeMounts"])


def test_every_pod_is_probed_and_unprivileged(service: dict[str, Any]) -> None:
    for group in groups(service):
        assert {"livenessProbe", "readinessProbe"} <= container(group).keys()
        assert container(group)["securityContext"]["allowPrivilegeEscalation"] is False
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


def test_versions_agree(rendered: list[dict[str, Any]], service: dict[str, Any]) -> None:
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == version("ray")
    (image,) = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["images"]
    assert (image["name"], image["newTag"]) == ("braid-serve", version("braid-serve"))
    for group in groups(service):
        assert container(group)["image"].split(":")[0] == "braid-serve"


def test_the_container_file_copies_what_the_wheel_needs() -> None:
    root = MANIFESTS.parent
    lines = [line.split() for line in (MANIFESTS / "Containerfile").read_text().splitlines()]
    copied = {word for words in lines if words[:1] == ["COPY"] for word in words[1:-1] if not word.startswith("--from")}
    assert {file.parent.name for file in root.glob("*/__init__.py")} <= copied
    assert all((root / name).exists() for name in copied if not name.startswith("/"))
