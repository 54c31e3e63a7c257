"""What a RayService runs: brings the cluster up on the Ray it stands in, then hands Serve the HTTP front end.

Serve may build the application again at any time, so a cluster that is already there is taken as it is.
"""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray import serve

from ..cluster.controller_settings import ControllerSettings
from ..cluster.errors import ClusterNotFound, SpecError
from ..cluster.http_serve import application
from ..cluster.launch import GrpcMetrics, ViewFeed, find_controller, start_controller
from ..cluster.preflight import model_facts, read_api_keys, read_secret
from ..cluster.spec import ClusterSpec, load_spec


def build(args: dict[str, Any]) -> serve.Application:
    """`args` stand in serveConfigV2: `spec` is the ClusterSpec's path, `start_timeout_s` how long loading may take.

    Returns when the workers serve: until then Serve has no route, and Kubernetes sends nobody here.
    """
    settings = settings_for(load_spec(Path(args["spec"]), {}), float(args["start_timeout_s"]))
    try:
        controller = find_controller(settings.spec.name)
    except ClusterNotFound:
        controller = start_controller(settings)
    ray.get(controller.up.remote())  # one that an earlier build has started may still be loading
    return application(settings, ViewFeed(settings.spec.name), GrpcMetrics(settings.spec.name))


def settings_for(spec: ClusterSpec, start_timeout_s: float) -> ControllerSettings:
    if spec.security.secret_file is None:
        raise SpecError(
            "security.secret_file: must name a file (of a Secret): a front end built again needs the same secret"
        )
    return ControllerSettings(
        spec=spec,
        model=model_facts(spec),
        secret=read_secret(spec),
        api_keys=read_api_keys(spec),
        socket_dir=str(Path(tempfile.gettempdir()) / f"braid-{spec.name}-{secrets.token_hex(4)}"),
        is_local=False,
        start_timeout_s=start_timeout_s,
        place_timeout_s=start_timeout_s,
        with_http=False,
    )
