"""What `up` finds out before it starts anything."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from braid.cluster.errors import SpecError
from braid.cluster.local_gpus import LocalGpus
from braid.cluster.preflight import (
    check_gpus,
    check_ports,
    check_weights,
    model_facts,
    model_path,
    read_api_keys,
    read_secret,
)
from braid.cluster.spec import ClusterSpec, from_dict, load_spec


def test_the_bundled_model_is_ready_to_serve() -> None:
    facts = model_facts(ClusterSpec())
    assert facts.num_experts >= 16
    assert facts.architecture == "DeepseekV3ForCausalLM"
    check_weights(ClusterSpec(), facts)


def test_the_map_covers_the_mtp_layer_while_drafts_are_wanted(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("engine: {speculation: off}")
    assert model_facts(ClusterSpec()).moe_layers == (1, 2, 3, 4, 5)
    assert model_facts(load_spec(spec, {})).moe_layers == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": {"path": "/nowhere"}}, "model.path: /nowhere is not a directory"),
        ({"experts": {"workers": 999}}, "experts.workers: 999 workers for"),
        ({"engine": {"max_model_len": 10**6}}, "engine.max_model_len: 1000000 is longer than the model's context of"),
    ],
)
def test_a_model_that_cannot_be_served_as_asked(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_facts(from_dict(spec))


def without_weights(folder: Path) -> Path:
    """The bundled model's small files."""
    for file in model_path(ClusterSpec()).glob("*.json"):
        shutil.copy(file, folder)
    return folder


def test_a_model_without_a_tokenizer_is_announced(tmp_path: Path) -> None:
    (without_weights(tmp_path) / "tokenizer.json").unlink()
    (tmp_path / "LICENSE-MODEL").write_text("DEEPSEEK LICENSE AGREEMENT\n")
    terms, text = model_facts(from_dict({"model": {"path": str(tmp_path)}})).notices
    assert "read LICENSE-MODEL" in terms
    assert "has no tokenizer.json: this cluster takes token ids, not text" in text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("chat_template.jinja", "{% for %}", "the chat template does not compile"),
    ],
)
def test_a_broken_tokenizer_is_said_before_anything_starts(tmp_path: Path, file: str, text: str, message: str) -> None:
    (without_weights(tmp_path) / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        model_facts(from_dict({"model": {"path": str(tmp_path)}}))


def test_too_little_memory_is_said_with_the_figures() -> None:
    crowd = from_dict({"decode": {"workers": 100_000}})
    with pytest.raises(ValueError, match=r"needs [\d.]+ \w+ for the weights, [\d.]+ \w+ of memory available"):
        check_weights(crowd, model_facts(crowd))
    cache = from_dict({"engine": {"kv_tokens": 10**12}})
    with pytest.raises(SpecError, match=r"kv_tokens: 1000000000000 tokens take .* GiB on each of 2"):
        check_weights(cache, model_facts(cache))


def test_gpus_that_are_not_there_are_said_before_anything_starts() -> None:
    spec = from_dict({pool: {"gpus": 0.5} for pool in ("prefill", "decode", "experts")})
    facts = model_facts(spec)
    with pytest.raises(SpecError, match="the pools ask for GPUs, and this machine has no NVIDIA GPU"):
        check_gpus(spec, facts, LocalGpus(problem="this machine has no NVIDIA GPU"))
    one = LocalGpus(("NVIDIA H100",), (80 << 30,), is_there=True)
    with pytest.raises(SpecError, match="the pools take 2 GPUs and this machine has 1; lower the shares"):
        check_gpus(spec, facts, one)
    two = LocalGpus(one.names * 2, one.memory * 2, is_there=True)
    check_gpus(spec, facts, two)
    check_weights(spec, facts, two)
    with pytest.raises(ValueError, match=r"needs .* for the weights, 0 B of memory available"):
        check_weights(spec, facts, LocalGpus(two.names, (0, 0), is_there=True))
    check_gpus(ClusterSpec(), facts, LocalGpus())


def test_a_port_in_use_names_the_port_and_the_pid() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=rf"http_port: port {port} on 127\.0\.0\.1 is in use by pid {os.getpid()}"):
            check_ports(from_dict({"front_end": {"http_port": port}}))


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(SpecError, match=r"cannot listen on 192\.0\.2\.77:8000: "):
        check_ports(from_dict({"front_end": {"host": "192.0.2.77"}}))


def test_secrets_come_from_the_file_or_are_drawn(tmp_path: Path) -> None:
    assert len(read_secret(ClusterSpec())) == 32
    assert read_secret(ClusterSpec()) != read_secret(ClusterSpec())
    file = tmp_path / "secret"
    spec = from_dict({"security": {"secret_file": str(file)}})
    with pytest.raises(SpecError, match=r"secret_file: cannot read .*: No such file"):
        read_secret(spec)
    file.write_text("short\n")
    with pytest.raises(SpecError, match="holds 5 bytes, at least 16"):
        read_secret(spec)
    file.write_text("0123456789abcdef\n")
    assert read_secret(spec) == b"0123456789abcdef"


def test_api_keys_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    spec = from_dict({"security": {"api_key_file": str(file)}})
    file.write_text("# ours\nalpha\n\n  beta \n")
    assert read_api_keys(spec) == ("alpha", "beta")
    file.write_text("# none\n")
    with pytest.raises(SpecError, match="holds no key"):
        read_api_keys(spec)
    assert read_api_keys(ClusterSpec()) == ()
