"""A Ray of our own: started inside the supervisor, in the run folder, with its own token; gone when we go."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from pathlib import Path

from .errors import ClusterNotFound
from .local_gpus import local_gpus
from .spec import ClusterSpec

OBJECT_STORE_BYTES = 200 << 20  # no tensors travel through Ray: only views and settings
CONNECT_TIMEOUT_S = 5.0
SPARE_CPUS = 2.0  # what front ends ask for


def start_ray(run_dir: Path, spec: ClusterSpec) -> None:
    """Starts Ray with as many logical CPUs as the spec's workers ask for, however few cores there are.

    GPUs are this machine's, where the spec asks for any: Ray shows each worker its own.
    """
    token = run_dir / "ray-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    # Ray reads these when it is imported; its processes inherit them.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0")
    # Law 10: loopback. Ray turns _node_ip_address="127.0.0.1" into the host's own address; this is the one way to have
    # its servers listen on loopback only, meant for systems where it supports no more than one node.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):  # the user's own Ray is none of ours
        os.environ.pop(name, None)
    import ray

    ray.init(
        address="local",
        num_cpus=math.ceil(cpus_wanted(spec) + SPARE_CPUS),
        num_gpus=local_gpus().count if spec.uses_gpus else 0,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        logging_config=ray.LoggingConfig(encoding="TEXT", log_level="INFO"),
        _temp_dir=str(run_dir / "ray"),
    )


def connect(address: str) -> None:
    """Joins an existing Ray as one more driver. Raises ClusterNotFound when there is none."""
    check_answers(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())
        wanted = "one with token authentication wants RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
        raise ClusterNotFound(f"no Ray cluster can be joined at {address!r}: {told} ({wanted})") from None


def check_answers(address: str) -> None:
    """Raises ClusterNotFound. Ray itself tries for minutes before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return  # 'auto' and the like: Ray finds out quickly
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterNotFound(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from None


def stop_ray() -> None:
    import ray

    ray.shutdown()


def cpus_wanted(spec: ClusterSpec) -> float:
    pools = (spec.prefill, spec.decode, spec.experts)
    return sum(pool.workers * pool.cpus for pool in pools)
