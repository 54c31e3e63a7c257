"""The command line: every mistake is one line and an exit code, and nothing is started."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from braid.cluster.cli import _first_key, main
from braid.cluster.errors import SpecError
from braid.cluster.ports import free_ports
from braid.cluster.processes import process_of
from braid.cluster.registry import Record, Registry


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test may find the clusters of whoever runs it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["up", "nowhere.yaml"], 2, "cannot read the spec nowhere.yaml: No such file or directory"),
        (["up", "--decode", "0"], 2, "decode.workers: 0 leaves nobody to decode"),
        (["up", "--experts", "some"], 2, "--experts: expected a number of workers or 'colocated', got 'some'"),
        (["up", "--experts", "0"], 2, "experts.workers: 0 leaves nobody"),
        (["up", "--name", "Not Good"], 2, "name: 'Not Good' must be"),
        (["up", "--http-port", "9000"], 2, "front_end.grpc_port: 9000 is the HTTP port too"),
        (["up", "--model", "/nowhere"], 2, "model.path: /nowhere is not a directory"),
        (["status"], 1, "no cluster 'braid' was started on this machine (none is up here)"),
        (["down", "--name", "x"], 1, "no cluster 'x' was started on this machine"),
        (["generate", "hello"], 1, "no cluster 'braid' was started"),
        (["generate", "hello", "--api-key-file", "/nowhere", "--target", "x:1"], 1, "No such file"),
        (["generate", "hello", "--max-tokens", "-1", "--target", "x:1"], 2, "a sampling flag is out of range"),
        (["inspect", "/nowhere"], 2, "/nowhere"),
    ],
)
def test_one_line_and_a_code(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    told = capsys.readouterr().err
    assert told.startswith("braid: ")
    assert message in told
    assert told.count("\n") == 1


def test_the_first_key_of_a_file_is_sent(tmp_path: Path) -> None:
    """The file may be the server's own, comments and all."""
    keys = tmp_path / "keys"
    keys.write_text("# of the operators\n\n  sk-one \nsk-two\n")
    assert _first_key(keys) == "sk-one"
    keys.write_text("# none yet\n")
    with pytest.raises(SpecError, match="keys holds no key"):
        _first_key(keys)


def test_a_cluster_on_somebody_s_ray_ends_with_its_supervisor_here(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked by the Ray's address or not: a supervisor that stayed would keep the name."""
    address = "127.0.0.1:1"
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as child:
        registry = Registry(home / ".cache" / "braid")
        supervisor = process_of(child.pid)
        claimed = registry.claim(Record("one", "", "127.0.0.1", 8000, 9000, "/model", address, supervisor))
        registry.write(replace(claimed, supervisor=supervisor))
        threading.Thread(target=child.wait).start()  # or what has ended would stay in the table of processes
        assert main(["down", "--name", "one", "--address", address]) == 0
        assert capsys.readouterr().out == "cluster one is down\n"
    assert registry.find("one") is None


def test_a_mistake_in_the_spec_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("engine: {max_sequences: many}\n")
    assert main(["up", str(spec)]) == 2
    assert capsys.readouterr().err == "braid: engine.max_sequences: expected int, got 'many'\n"


def test_a_port_in_use_starts_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (free,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["up", "--grpc-port", str(taken.getsockname()[1]), "--http-port", str(free)]) == 2
    assert "front_end.grpc_port: port" in capsys.readouterr().err
    assert not (home / ".cache").exists()


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--target", "127.0.0.1:1"]) == 1
    assert "nothing answers at 127.0.0.1:1: is the cluster up?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["up", "--speed", "9"],
        ["up", "--timeout", "nan"],
        ["up", "--timeout=-1"],
        ["convert", "a", "b", "--to", "int4"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: braid" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("braid 0.")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from braid.cluster.cli import _parser; _parser();"
        "print([name for name in ('ray', 'torch', 'grpc', 'rich', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_control_processes_do_without_torch() -> None:
    """Controller, front ends and supervisor: two seconds of start and 200 MB each."""
    rooms = "controller, front_actor, http_serve, launch, local_ray, supervisor, worker_process, up"
    code = f"import sys; from braid.cluster import {rooms}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
