"""Whom an attention worker dials, and from when on front ends may hear of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from generators import make_hf_model, save_hf_model
from processes import SECRET, WireFront, WorkerProcess
from waiting import LIMIT_S

from braid.actors.attention_worker import AttentionWorker, dial_targets
from braid.actors.reactor import Event
from braid.actors.settings import WorkerSettings
from braid.actors.view import ClusterView, Role, WorkerInfo
from braid.model.sampling_params import SamplingParams
from braid.router.expert_map import ExpertMap

ROLES: dict[str, Role] = {"a": "both", "b": "both", "d": "decode", "e": "expert", "p": "prefill", "q": "prefill"}


def view(has_map: bool) -> ClusterView:
    infos = tuple(WorkerInfo(name, role, 1, "host", "", "", 0, 0, "node") for name, role in ROLES.items())
    return ClusterView(1, infos, ExpertMap(1, 0, (), {}) if has_map else None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", {"b", "d", "e"}), ("b", {"d", "e"}), ("d", {"e"}), ("p", {"a", "b", "d", "e"}), ("q", {"a", "b", "d", "e"})],
)
def test_of_two_workers_that_must_talk_exactly_one_dials(name: str, expected: set[str]) -> None:
    assert {worker.name for worker in dial_targets(name, ROLES[name], view(has_map=True))} == expected
    assert {worker.name for worker in dial_targets(name, ROLES[name], view(has_map=False))} == expected - {"e"}


def test_a_request_that_follows_the_first_load_at_once_finds_the_links_of_the_view(tmp_path: Path) -> None:
    checkpoint = save_hf_model(make_hf_model("v3", seed=3)[0], tmp_path / "model")

    def settings(name: str, role: Role) -> WorkerSettings:
        return WorkerSettings(
            "test", name, role, 1, "node", str(checkpoint), "float32", SECRET, str(tmp_path), "127.0.0.1", "auto", 1,
            colocated=True, kv_tokens=512,
        )  # fmt: skip

    decode = WorkerProcess(settings("decode-0", "decode"))
    decode.start_call("prepare")
    num_threads = torch.get_num_threads()
    prefill, front = AttentionWorker(settings("prefill-0", "prefill")), WireFront()
    try:
        infos = prefill.prepare(), decode.result()
        first = ClusterView(1, infos, None)
        decode.call("apply", first)
        for info in infos:
            front.connect(info)
        front.wait(lambda: "decode-0" in front.loads, "the decode worker's load")
        submitted = apply_late(prefill, first)
        front.wait(lambda: "prefill-0" in front.loads, "the prefill worker's load")
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        front.submit("r", [5, 6, 7], params, "decode-0", "prefill-0")
        submitted.set()
        front.finish("r")
        assert (front.answers["r"].error, len(front.answers["r"].token_ids)) == (None, 3)
    finally:
        front.close()
        prefill.stop()
        decode.close()
        torch.set_num_threads(num_threads)  # a worker has its process to itself, elsewhere


def apply_late(worker: AttentionWorker, first: ClusterView) -> threading.Event:
    """The view comes right after a look at the inbox; once it is open, the next look waits for the event returned."""
    assert worker.endpoint is not None
    look, submitted = worker.endpoint.inbox, threading.Event()

    def inbox(timeout_s: float) -> list[Event]:
        if worker._is_open:
            assert submitted.wait(LIMIT_S)
        events = look(timeout_s)
        worker.apply(first)
        return events

    worker.endpoint.inbox = inbox  # type: ignore[method-assign]
    worker.endpoint.reactor.wake()
    return submitted
