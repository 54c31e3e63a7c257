"""Names of clusters on this machine: claimed once, swept when their owner is gone, removed without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import LIMIT_S

from braid.cluster.errors import ClusterExists, ClusterNotFound, SpecError, StartFailed
from braid.cluster.processes import Process, is_alive, process_of
from braid.cluster.registry import KEPT_LOGS, LOGS, LONGEST_RUN_DIR, Record, Registry
from braid.cluster.spec import from_dict


def record(name: str = "one", owner: Process | None = None) -> Record:
    return Record(name, "", "127.0.0.1", 8000, 9000, "/model", None, owner or process_of(os.getpid()))


def test_a_claimed_name_is_found_and_taken(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    claimed = registry.claim(record())
    assert registry.find("one") == claimed
    assert registry.all() == [claimed]
    assert claimed.is_alive()
    assert Path(claimed.run_dir).stat().st_mode & 0o777 == 0o700
    with pytest.raises(ClusterExists, match=rf"'one' is already up \(pid {os.getpid()}, HTTP 127\.0\.0\.1:8000\)"):
        registry.claim(record())
    registry.remove(claimed)
    registry.remove(claimed)
    assert not Path(claimed.run_dir).exists()
    assert registry.all() == []


def test_socket_paths_stay_short_wherever_the_cache_is(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60)
    claimed = Registry(deep).claim(record())
    assert len(claimed.run_dir) <= LONGEST_RUN_DIR
    assert Registry(deep).get("one") == claimed
    Registry(deep).remove(claimed)
    assert not Path(claimed.run_dir).exists()


def test_a_full_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braid.cluster.registry.LEAST_FREE", 2**62)
    with pytest.raises(StartFailed, match=r"MiB of free disk and a cluster wants .*: make room there"):
        Registry(tmp_path).claim(record())
    assert list(tmp_path.glob("[!.]*")) == []


def test_an_unknown_name_says_which_are_known(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with pytest.raises(ClusterNotFound, match="none is up here"):
        registry.get("one")
    claimed = registry.claim(record("two"))
    with pytest.raises(ClusterNotFound, match=r"no cluster 'one' .*up here: two"):
        registry.get("one")
    registry.write(replace(claimed, owner=Process(2**22 + 1, 1)))
    with pytest.raises(ClusterNotFound, match="none is up here"):
        registry.get("one")
    registry.remove(claimed)


def test_a_claim_sweeps_up_after_a_dead_supervisor(tmp_path: Path) -> None:
    """Its session may still have members: they are ended, then the name is free."""
    registry = Registry(tmp_path)
    script = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as leader:
        supervisor = process_of(leader.pid)
        assert leader.stdout is not None
        orphan = process_of(int(leader.stdout.readline()))
    gone = Process(2**22 + 1, 1)
    registry.write(replace(registry.claim(record(owner=gone)), supervisor=supervisor))
    found = registry.get("one")
    assert not found.is_alive()
    assert found.processes() == [orphan]
    registry.remove(registry.claim(record()))
    assert not is_alive(orphan)


def test_what_is_started_while_the_others_end_is_ended_too() -> None:
    script = (
        "import signal, subprocess, sys; start = lambda *_: (subprocess.Popen(['sleep', '600']), sys.exit());"
        "signal.signal(signal.SIGTERM, start); print(1, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as leader:
        assert leader.stdout is not None
        leader.stdout.readline()
        cluster = replace(record(), supervisor=process_of(leader.pid))
        assert cluster.end(grace_s=LIMIT_S) == []
        assert cluster.processes() == []


def test_logs_of_failures_are_kept_but_not_for_ever(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    kept = []
    for number in range(KEPT_LOGS + 2):
        claimed = registry.claim(record(f"c{number}"))
        claimed.log_file.write_text(f"why {number}")
        logs = Path(claimed.run_dir) / "ray" / "session_2026" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.out").write_text("ray's side")
        kept.append(registry.keep_logs(claimed))
        os.utime(kept[-1], (number, number))
        registry.remove(claimed)
    assert (kept[-1] / "up.log").read_text() == f"why {KEPT_LOGS + 1}"
    assert (kept[-1] / "ray" / "raylet.out").read_text() == "ray's side"
    assert len(list((tmp_path / LOGS).iterdir())) == KEPT_LOGS
    with pytest.raises(SpecError, match=f"name: '{LOGS}' must be"):
        from_dict({"name": LOGS})


def test_a_log_that_cannot_be_kept_keeps_no_failure_from_being_told(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    claimed = registry.claim(record())
    logs = Path(claimed.run_dir) / "ray" / "session_2026" / "logs"
    logs.mkdir(parents=True)
    os.mkfifo(logs / "pipe")
    (logs / "raylet.out").write_text("ray's side")
    kept = registry.keep_logs(claimed)
    assert (kept / "ray" / "raylet.out").read_text() == "ray's side"
    registry.remove(claimed)
    (tmp_path / "file").write_text("no folder can be made here")
    assert Registry(tmp_path / "file").keep_logs(claimed).name.startswith("one-")
