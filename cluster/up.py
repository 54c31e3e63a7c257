"""`braid up`: checks everything, takes the name, spawns the supervisor and follows it until it serves, or for good."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .controller_settings import ControllerSettings, ModelFacts
from .errors import StartFailed
from .local_gpus import local_gpus
from .local_ray import check_answers
from .preflight import check_gpus, check_ports, check_weights, model_facts, read_api_keys, read_secret
from .processes import process_of
from .registry import Record, Registry
from .spec import ClusterSpec
from .supervisor import Orders

START_MARGIN_S = 300.0  # what Ray and the teardown of a failed start may take on top of --timeout

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Started:
    """A supervisor on its way; `child.stdout` brings its news."""

    record: Record
    child: subprocess.Popen[bytes]
    give_up_at: float


def check(spec: ClusterSpec) -> ModelFacts:
    """Everything that can be known beforehand. Raises ValueError or ClusterNotFound with one clear line."""
    facts = model_facts(spec)
    if spec.ray_address is None:
        check_ports(spec)
        gpus = local_gpus()
        check_gpus(spec, facts, gpus)
        check_weights(spec, facts, gpus)
    else:
        check_answers(spec.ray_address)
    return facts


def unused_gpus(spec: ClusterSpec) -> tuple[str, ...]:
    """One line when the workers of a Ray of our own leave this machine's GPU alone."""
    if spec.ray_address is not None or spec.uses_gpus:
        return ()
    unused = local_gpus().unused
    return () if unused is None else (unused,)


def start(spec: ClusterSpec, facts: ModelFacts, registry: Registry, timeout_s: float, detach: bool) -> Started:
    """Takes the name and spawns the supervisor in a session of its own. Raises ClusterExists."""
    secret, api_keys = read_secret(spec), read_api_keys(spec)
    record = registry.claim(_record(spec, facts))
    try:
        settings = ControllerSettings(
            spec=spec,
            model=facts,
            secret=secret,
            api_keys=api_keys,
            socket_dir=_socket_dir(spec, record),
            is_local=spec.ray_address is None,
            start_timeout_s=timeout_s,
            place_timeout_s=timeout_s,
        )
        child = _spawn(record)
        record = replace(record, supervisor=process_of(child.pid))
        registry.write(record)
        assert child.stdin is not None
        pickle.dump(Orders(settings, record, registry.root, outlives_parent=detach), child.stdin)
        child.stdin.flush()
    except BaseException:
        registry.remove(record)
        raise
    return Started(record, child, time.monotonic() + timeout_s + START_MARGIN_S)


def wait_until_ready(started: Started, registry: Registry, tell: Tell) -> dict[str, Any]:
    """The status of the serving cluster. Raises StartFailed with the supervisor's reason."""
    for news in _news(started, registry):
        if news["state"] == "ready":
            status: dict[str, Any] = news["status"]
            return status
        if news["state"] == "failed":
            raise StartFailed(f"{news['reason']} (logs: {news['logs']})")
        if news["state"] == "stopped":
            raise StartFailed("stopped while starting")
        tell(news)
    raise _broken(started, registry, "the supervisor ended without a word")


def keep(started: Started) -> int:
    """Waits until the cluster is down: asked by a signal, by `braid down`, or by itself."""
    return started.child.wait()


@contextmanager
def signals_stop_it(started: Started, say: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and its kin ask the supervisor for an orderly end; once is enough."""

    def stop(number: int, frame: object) -> None:
        say()
        started.child.send_signal(signal.SIGTERM)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record(spec: ClusterSpec, facts: ModelFacts) -> Record:
    front = spec.front_end
    return Record(
        name=spec.name,
        run_dir="",
        host=front.host,
        http_port=front.http_port,
        grpc_port=front.grpc_port,
        model=facts.path,
        ray_address=spec.ray_address,
        owner=process_of(os.getpid()),
    )


def _socket_dir(spec: ClusterSpec, record: Record) -> str:
    """On an existing Ray the workers may be on other hosts, where our run folder is not."""
    if spec.ray_address is None:
        return str(Path(record.run_dir) / "s")
    return str(Path(tempfile.gettempdir()) / f"braid-{spec.name}-{secrets.token_hex(4)}")


def _spawn(record: Record) -> subprocess.Popen[bytes]:
    """Not in the caller's folder: Ray would put it on the workers' path, and a checkout's kernels/ hides a package."""
    with record.log_file.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "braid.cluster.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=record.run_dir,
            start_new_session=True,
        )


def _broken(started: Started, registry: Registry, what: str) -> StartFailed:
    """Sweeps up after a supervisor that could not do it itself."""
    started.record.end(grace_s=5.0)
    logs = registry.keep_logs(started.record)
    registry.remove(started.record)
    return StartFailed(f"{what} (logs: {logs})")


def _news(started: Started, registry: Registry) -> Iterator[dict[str, Any]]:
    """What the supervisor tells, until it ends. Raises StartFailed when it is silent for too long."""
    assert started.child.stdout is not None
    pipe, rest = started.child.stdout.fileno(), b""
    while True:
        left_s = started.give_up_at - time.monotonic()
        if left_s <= 0:
            raise _broken(started, registry, "the supervisor hung and was killed")
        if not select.select([pipe], [], [], min(left_s, 1.0))[0]:
            continue
        data = os.read(pipe, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (json.loads(line) for line in lines)
