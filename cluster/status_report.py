"""What `braid status --json` says: plain values made from the cluster's state and the workers' own reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..actors.view import ClusterView
from .controller_settings import ControllerSettings
from .front_check import address
from .state import ClusterState, Worker

Report = Mapping[str, Any]


def report(
    settings: ControllerSettings, state: ClusterState, workers: Mapping[str, Report], fronts: Mapping[str, Report]
) -> dict[str, Any]:
    spec, model = settings.spec, settings.model
    front = spec.front_end
    rows = [_worker(worker, workers.get(name, {})) for name, worker in state.workers.items()]
    return {
        "name": spec.name,
        "state": state.phase,
        "problems": list(state.problems),
        "model": {
            "name": spec.served_name,
            "path": model.path,
            "architecture": model.architecture,
            "notices": list(model.notices),
        },
        "endpoints": {
            "http": f"http://{address(front.host, front.http_port)}",
            "grpc": address(front.host, front.grpc_port),
        },
        "epoch": state.view.epoch if state.view else 0,
        "workers": rows,
        "expert_map": _expert_map(state.view),
        "load": _load(rows),
        "fronts": {name: dict(answer) for name, answer in fronts.items()},
        "story": list(state.story)[-20:],
    }


def _worker(worker: Worker, told: Report) -> dict[str, Any]:
    counters = told.get("counters", told)
    return {
        "name": worker.plan.name,
        "role": worker.plan.role,
        "node": worker.node.name if worker.node else None,
        "device": told.get("device"),
        "device_memory_used": told.get("device_memory_used"),
        "device_memory": told.get("device_memory"),
        "pid": worker.info.pid if worker.info else told.get("pid"),
        "incarnation": worker.incarnation,
        "state": worker.state,
        "reason": worker.reason,
        "sequences": told.get("sequences", 0),
        "waiting": told.get("waiting", 0),
        "free_blocks": told.get("free_blocks"),
        "total_blocks": told.get("total_blocks"),
        "experts": list(worker.plan.expert_ids) if worker.plan.expert_ids is not None else None,
        "tokens": counters.get("tokens", 0),
        "hops": counters.get("hops", 0),
        "loading": {key: told[key] for key in ("phase", "done_bytes", "total_bytes") if key in told},
        "links": list(told.get("links", ())),
        "counters": {key: value for key, value in counters.items() if isinstance(value, (int, float))},
    }


def _expert_map(view: ClusterView | None) -> dict[str, Any] | None:
    """`replicas` counts the live owners of each expert, in the layer where it has fewest."""
    if view is None or view.expert_map is None:
        return None
    live = {info.name for info in view.workers}
    owners = view.expert_map.owners
    layers = view.expert_map.replicas.values()
    counts = [[sum(owners[index].worker in live for index in holders) for holders in layer] for layer in layers]
    return {
        "epoch": view.expert_map.epoch,
        "layers": list(view.expert_map.replicas),
        "replicas": [min(column) for column in zip(*counts, strict=True)],
        "owners": [owner.worker for owner in owners],
    }


def _load(rows: list[dict[str, Any]]) -> dict[str, Any]:
    attention = [row for row in rows if row["total_blocks"] is not None and row["state"] != "lost"]
    return {
        "sequences": sum(row["sequences"] for row in attention),
        "waiting": sum(row["waiting"] for row in attention),
        "free_blocks": sum(row["free_blocks"] for row in attention),
        "total_blocks": sum(row["total_blocks"] for row in attention),
        "preemptions": sum(row["counters"].get("preemptions", 0) for row in attention),
        "prefix_hit_rate": _hit_rate([row["counters"] for row in attention]),
    }


def _hit_rate(counters: list[dict[str, float]]) -> float | None:
    """The share of all prompt tokens that were in a cache already; None before the first prompt."""
    asked = sum(count.get("prefix_query_tokens", 0) for count in counters)
    return sum(count.get("prefix_hit_tokens", 0) for count in counters) / asked if asked else None
