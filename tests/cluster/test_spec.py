"""The ClusterSpec parser: defaults, files, flags, and an answer for every kind of mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from braid.cluster.errors import SpecError
from braid.cluster.spec import ClusterSpec, from_dict, load_spec, overlay
from braid.cluster.spec_parser import read_yaml

ON_GPUS = {pool: {"gpus": 0.25} for pool in ("prefill", "decode", "experts")}


def test_an_empty_spec_is_the_default_cluster() -> None:
    assert from_dict({}) == ClusterSpec()
    assert ClusterSpec().num_workers == 4
    assert ClusterSpec().served_name == "braid-tiny"


def test_round_trip_through_plain_values() -> None:
    spec = from_dict(
        {"name": "two", "experts": {"workers": 3, "labels": {"role": "expert"}}, "engine": {"kv_tokens": 128}}
    )
    assert from_dict(spec.to_dict()) == spec


def test_gpus_of_pools_that_have_workers() -> None:
    assert not ClusterSpec().uses_gpus
    assert from_dict(ON_GPUS).uses_gpus
    one = from_dict({"prefill": {"workers": 0}, "decode": {"gpus": 1}, "experts": "colocated"})
    assert list(one.pools) == ["decode"]
    assert one.uses_gpus


@pytest.mark.parametrize("layout", ["colocated", {"colocated": True}])
def test_colocated_means_no_expert_workers(layout: Any) -> None:
    spec = from_dict({"experts": layout})
    assert spec.experts.colocated
    assert spec.experts.workers == 0
    assert from_dict(spec.to_dict()) == spec


def test_replicas_default_to_what_the_workers_allow() -> None:
    assert from_dict({"experts": {"workers": 1}}).experts.replicas == 1
    assert from_dict({"experts": {"workers": 5}}).experts.replicas == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"decoed": {}}, "decoed: unknown setting 'decoed'; did you mean 'decode'?"),
        ({"engine": {"max_sequence": 3}}, "engine.max_sequence: unknown setting .* mean 'max_sequences'"),
        ({"engine": {"max_sequences": "many"}}, "engine.max_sequences: expected int, got 'many'"),
        ({"engine": {"max_sequences": True}}, "engine.max_sequences: expected int, got True"),
        ({"engine": 5}, r"engine: expected settings \(max_sequences"),
        ({"model": {"dtype": "float16"}}, "model.dtype: expected one of auto, float32, bfloat16, got 'float16'"),
        ({"transport": "tpc"}, "transport: .* did you mean 'tcp'"),
        ({"prefill": {"strategy": "strict_spread"}}, "prefill.strategy: expected one of PACK"),
        ({"prefill": {"labels": ["a"]}}, "prefill.labels: expected labels"),
        ({"prefill": {"labels": {"zone": 1}}}, "prefill.labels.zone: expected str, got 1"),
        ({"prefill": {"workers": -1}}, "prefill.workers: -1 is negative"),
        ({"decode": {"workers": 0}}, "decode.workers: 0 leaves nobody to decode"),
        ({"experts": {"workers": 0}}, "experts.workers: 0 leaves nobody to hold them"),
        ({"experts": {"workers": 2, "replicas": 3}}, "experts.replicas: 3 copies"),
        ({"experts": {"workers": 2, "colocated": True}}, "exclude each other"),
        ({"prefill": {"cpus": 0}}, r"prefill\.cpus: 0\.0 must be above 0"),
        ({"decode": {"gpus": -1}}, r"decode\.gpus: -1 must be 0 \(the CPU\), 1, or a share of one GPU"),
        ({"decode": {"gpus": float("nan")}}, r"decode\.gpus: nan must be 0"),
        ({"experts": {"gpus": 2}}, r"experts\.gpus: 2 must be .* more GPUs take more workers"),
        ({"prefill": {"gpus": 1e-5}}, r"prefill\.gpus: 1e-05 must be .* of at least 0\.01"),
        ({"decode": {"gpus": 1}, "experts": "colocated"}, r"prefill\.gpus: 0, while decode use GPUs"),
        ({"decode": {"gpus": 1}, "prefill": {"gpus": 1}}, r"experts\.gpus: 0, while prefill and decode use GPUs"),
        ({**ON_GPUS, "model": {"dtype": "float32"}}, r"model\.dtype: float32 is for the CPU"),
        ({"experts": "collocated"}, "experts: expected 'colocated' or settings"),
        ({"front_end": {"host": ""}}, "front_end.host: must not be empty"),
        ({"front_end": {"http_port": 9000}}, "front_end.grpc_port: 9000 is the HTTP port too"),
        ({"front_end": {"http_port": 70000}}, "front_end.http_port: 70000 must be between"),
        ({"front_end": {"request_timeout_s": float("inf")}}, "request_timeout_s: inf must be above 0"),
        ({"engine": {"max_sequences": 0}}, "engine.max_sequences: 0 must be at least 1"),
        ({"engine": {"max_batch_tokens": 64}}, "engine.max_batch_tokens: 64 must exceed"),
        ({"engine": {"kv_tokens": 1}}, "engine.kv_tokens: 1 must be at least 64"),
        ({"name": "My Cluster"}, "name: 'My Cluster' must be"),
        ({"transport": "shm", "decode": {"workers": 2, "strategy": "STRICT_SPREAD"}}, "decode.strategy: STRICT_SPREAD"),
    ],
)
def test_mistakes_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2: 'name' is given twice"),
        ("prefill: [1\n", "is not valid YAML"),
        ("- a\n", "expected settings"),
        ("1: 2\n", "line 1: the key 1 is not a word"),
    ],
)
def test_broken_yaml(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_yaml(text, "x.yaml")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("name: filed\nexperts: {workers: 3, cpus: 0.5}\nmodel: {path: weights}\n")
    spec = load_spec(path, {"name": "flagged", "experts": {"colocated": True}})
    assert spec.name == "flagged"
    assert spec.experts.colocated
    assert spec.experts.cpus == 0.5
    assert spec.model.path == str(tmp_path / "weights")
    assert spec.served_name == "weights"
    assert load_spec(path, {"experts": {"workers": 1}}).experts.replicas == 1


def test_flags_over_a_short_form() -> None:
    assert from_dict(overlay({"experts": "colocated"}, {"experts": {"workers": 2}})).experts.workers == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read the spec .*nowhere\.yaml: No such file"):
        load_spec(tmp_path / "nowhere.yaml", {})
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SpecError, match="not UTF-8"):
        load_spec(tmp_path / "bytes.yaml", {})
