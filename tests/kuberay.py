"""The part of KubeRay 1.7's API that the manifests may use, as JSON Schemas: any other field is an error.

Pod templates stay open here; they are checked as Pods against Kubernetes' own schemas.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema

STRING: dict[str, Any] = {"type": "string"}
BOOLEAN: dict[str, Any] = {"type": "boolean"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
OPEN: dict[str, Any] = {"type": "object"}
WORDS: dict[str, Any] = {"type": "object", "additionalProperties": STRING}


def fields(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


GROUP = {"rayStartParams": WORDS, "labels": WORDS, "resources": WORDS, "template": OPEN}
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=STRING,
    authOptions=fields(mode=one_of("disabled", "token"), secretName=STRING),
    headGroupSpec=fields(("template",), serviceType=STRING, enableIngress=BOOLEAN, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            groupName=STRING,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            **GROUP,
        ),
    },
    enableInTreeAutoscaling=BOOLEAN,
    suspend=BOOLEAN,
)
SPECS = {
    "RayService": fields(
        ("rayClusterConfig",),
        rayClusterConfig=CLUSTER,
        serveConfigV2=STRING,
        upgradeStrategy=fields(type=one_of("NewCluster", "None")),
        excludeHeadPodFromServeSvc=BOOLEAN,
        rayClusterDeletionDelaySeconds=COUNT,
        suspend=BOOLEAN,
    ),
    "RayJob": fields(
        entrypoint=STRING,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        clusterSelector=WORDS,
        rayClusterSpec=CLUSTER,
        runtimeEnvYAML=STRING,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=COUNT,
        submitterPodTemplate=OPEN,
        suspend=BOOLEAN,
    ),
}


def check(resource: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError, which names the field."""
    spec = SPECS[resource["kind"]]
    whole = fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=one_of("ray.io/v1"),
        kind=STRING,
        metadata=fields(("name",), name=STRING, namespace=STRING, labels=WORDS, annotations=WORDS),
        spec=spec,
    )
    jsonschema.Draft7Validator(whole).validate(resource)


def groups(service: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The head group, under the name `head`, and every worker group of a RayService."""
    cluster = service["spec"]["rayClusterConfig"]
    yield {"groupName": "head", "replicas": 1, **cluster["headGroupSpec"]}
    yield from cluster["workerGroupSpecs"]
