"""What a front end tells Prometheus: its own requests, and the load its workers report. One registry per front end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TRANSFER_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TRANSFER_BYTES = tuple(float(4**power * 1024) for power in range(2, 12))  # 16 KiB to 4 GiB
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# counters of a load report that are states, not sums: name -> (metric, help)
EXPERT_LOAD = {
    "expert_balancedness": ("braid_expert_balancedness", "Mean load of the experts over the largest one"),
    "expert_max_vio": ("braid_expert_max_vio", "How far the busiest expert is above the mean (MaxVio)"),
}
STATES = {*EXPERT_LOAD, "epoch"}
GAUGES = {
    "kv_blocks_used": "Latent KV blocks in use",
    "kv_blocks_cached": "Latent KV blocks not in use that hold the beginning of a prompt",
    "kv_blocks_total": "Latent KV blocks there are",
    "sequences_running": "Sequences in the running batch",
    "sequences_waiting": "Sequences that wait for a place in the batch",
    "waiting_prompt_tokens": "Prompt tokens not yet computed",
}

_REPORTED = {
    "kv_blocks_cached": "cached_blocks",
    "kv_blocks_total": "total_blocks",
    "sequences_running": "running",
    "sequences_waiting": "waiting",
    "waiting_prompt_tokens": "waiting_tokens",
}

Load = Mapping[str, Any]  # actors/messages.py: load


class Metrics:
    """Counted by the front end; read at /metrics."""

    def __init__(self, waiting: Callable[[], int], loads: Callable[[], Sequence[Load]]) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.time_to_first_token = self._histogram("time_to_first_token", "From arrival to the first token", SECONDS)
        self.time_per_output_token = self._histogram(
            "time_per_output_token", "Mean time between the tokens of a request after its first", STEP_SECONDS
        )
        self.request_duration = self._histogram("request_duration", "From arrival to the last token", SECONDS)
        self.kv_transfer = self._histogram(
            "kv_transfer", "From the first KV row sent to the decode worker to the last", TRANSFER_SECONDS
        )
        self.kv_send = self._histogram(
            "kv_send", "Part of a KV transfer in which the prefill worker did nothing else", TRANSFER_SECONDS
        )
        self.kv_transfer_bytes = Histogram(
            "braid_kv_transfer_bytes", "KV rows sent for a request", buckets=TRANSFER_BYTES, registry=self.registry
        )
        self.requests = Counter(
            "braid_requests", "Requests ended, by how", ["finish"], registry=self.registry
        )  # stop, length, cancelled, or the code of a refusal
        self.prompt_tokens = Counter("braid_prompt_tokens", "Prompt tokens of placed requests", registry=self.registry)
        self.generation_tokens = Counter("braid_generation_tokens", "Tokens generated", registry=self.registry)
        self.registry.register(_Reported(waiting, loads))

    def note_transfer(self, timing: Mapping[str, float]) -> None:
        """`timing` comes with a request's first token; it tells of a transfer where there was one."""
        if "kv_s" in timing:
            self.kv_transfer.observe(timing["kv_s"])
            self.kv_send.observe(timing["kv_send_s"])
            self.kv_transfer_bytes.observe(timing["kv_bytes"])

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"braid_{name}_seconds", told, buckets=buckets, registry=self.registry)


class _Reported:
    """Reads the newest load reports when asked, so a worker that has gone leaves no stale figures."""

    def __init__(self, waiting: Callable[[], int], loads: Callable[[], Sequence[Load]]) -> None:
        self.waiting = waiting
        self.loads = loads

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        loads = self.loads()
        yield GaugeMetricFamily("braid_queue_requests", "Requests waiting for a decode worker", value=self.waiting())
        yield _gauge("braid_worker_up", "1 for every attention worker that is linked", [(load, 1) for load in loads])
        for name, told in GAUGES.items():
            yield _gauge(f"braid_worker_{name}", told, [(load, _state(load, name)) for load in loads])
        memory = [(load, float(load["device_memory_used"])) for load in loads if "device_memory_used" in load]
        yield _gauge("braid_worker_device_memory_used_bytes", "Memory of its GPU that a worker has taken", memory)
        epochs = [(load, load["counters"].get("epoch", 0)) for load in loads]
        yield _gauge("braid_expert_map_epoch", "Epoch of the expert map a worker routes by", epochs)
        for name, (metric, told) in EXPERT_LOAD.items():
            yield _by_layer(metric, told, [(load, load["counters"].get(name)) for load in loads])
        yield from _sums(loads)


def _state(load: Load, name: str) -> float:
    if name == "kv_blocks_used":
        return float(load["total_blocks"] - load["free_blocks"])
    return float(load[_REPORTED[name]])


def _gauge(name: str, told: str, values: list[tuple[Load, float]]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=["worker", "role"])
    for load, value in values:
        family.add_metric([load["worker"], load["role"]], value)
    return family


def _by_layer(name: str, told: str, values: list[tuple[Load, Mapping[int, float] | float | None]]) -> Metric:
    """One sample per layer where the worker tells layers apart, else their mean."""
    family = GaugeMetricFamily(name, told, labels=["worker", "layer"])
    for load, value in values:
        by_layer = value if isinstance(value, Mapping) else {} if value is None else {"mean": value}
        for layer, one in by_layer.items():
            family.add_metric([load["worker"], str(layer)], one)
    return family


def _sums(loads: Sequence[Load]) -> Iterator[Metric]:
    """Every other number a worker counts, under its own name: hops, bytes, cancelled sequences and so on."""
    families: dict[str, CounterMetricFamily] = {}
    for load in loads:
        for name, value in load["counters"].items():
            is_sum = isinstance(value, (int, float)) and name not in STATES
            if is_sum and re.fullmatch(r"[a-z][a-z0-9_]*", name):
                told = f"Counter {name} of an attention worker since its start"
                new = CounterMetricFamily(f"braid_worker_{name}", told, labels=["worker", "role"])
                families.setdefault(name, new).add_metric([load["worker"], load["role"]], float(value))
    yield from families.values()
