"""One exposition from all front ends: what each counted of its own requests is added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

REPORTED = ("braid_worker_", "braid_expert_")  # told by workers to every front end alike: the first one's will do
Key = tuple[str, tuple[tuple[str, str], ...]]


def add_up(expositions: Sequence[bytes]) -> bytes:
    """Sums samples of the same name and labels over the front ends; the first is the one asked."""
    families: dict[str, Metric] = {}
    sums: dict[str, dict[Key, float]] = {}
    for place, text in enumerate(expositions):
        for family in text_string_to_metric_families(text.decode()):
            if place and family.name.startswith(REPORTED):
                continue
            families.setdefault(family.name, family)
            into = sums.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                is_date = sample.name.endswith("_created")
                into[key] = (
                    min(into.get(key, sample.value), sample.value) if is_date else into.get(key, 0.0) + sample.value
                )
    return _exposed([_summed(families[name], samples) for name, samples in sums.items()])


def _summed(family: Metric, samples: dict[Key, float]) -> Metric:
    summed = Metric(family.name, family.documentation, family.type)
    for (name, labels), value in samples.items():
        summed.add_sample(name, dict(labels), value)
    return summed


def _exposed(families: Sequence[Metric]) -> bytes:
    class Collected:
        def collect(self) -> Iterator[Metric]:
            yield from families

    registry = CollectorRegistry()
    registry.register(Collected())
    return generate_latest(registry)
