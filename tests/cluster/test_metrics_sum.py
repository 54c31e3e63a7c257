"""Requests of all front ends in one exposition; what workers told each of them counts once."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from braid.cluster.metrics import Metrics
from braid.cluster.metrics_sum import add_up


def front(requests: int, waiting: int) -> Metrics:
    load = {"worker": "decode-0", "role": "decode", "free_blocks": 1, "total_blocks": 4, "running": 1, "waiting": 0}
    load |= {"cached_blocks": 0, "waiting_tokens": 0, "counters": {"tokens": 10, "epoch": 3}}
    metrics = Metrics(lambda: waiting, lambda: [load])
    for _ in range(requests):
        metrics.requests.labels("stop").inc()
        metrics.time_to_first_token.observe(0.2)
    return metrics


def values(exposition: bytes) -> dict[str, float]:
    return {
        f"{sample.name}{dict(sorted(sample.labels.items()))}": sample.value
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_one_front_alone_is_left_as_it_is() -> None:
    alone = front(2, 1).render()
    assert values(add_up([alone])) == values(alone)


def test_requests_add_up_and_workers_count_once() -> None:
    both = values(add_up([front(2, 1).render(), front(3, 4).render()]))
    assert both["braid_requests_total{'finish': 'stop'}"] == 5
    assert both["braid_queue_requests{}"] == 5
    assert both["braid_time_to_first_token_seconds_count{}"] == 5
    assert both["braid_time_to_first_token_seconds_bucket{'le': '0.25'}"] == 5
    assert both["braid_time_to_first_token_seconds_bucket{'le': '0.1'}"] == 0
    assert both["braid_worker_tokens_total{'role': 'decode', 'worker': 'decode-0'}"] == 10
    assert both["braid_expert_map_epoch{'role': 'decode', 'worker': 'decode-0'}"] == 3
