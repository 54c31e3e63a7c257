"""Rows through shared memory between real processes: the bits of local experts, through swaps and deaths."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import triton_interpreter
from torch import Tensor

from braid.actors import dispatch
from braid.actors.mailbox import ASLEEP, BUSY, BoxShape
from braid.actors.ways import MAX_MAIL_PEERS
from braid.benchmarks.gpu.mail_processes import START_S, Attention, ExpertProcess, Experts
from braid.kernels.gpu.mail import MAX_PEERS

CPU = torch.device("cpu")
EXPERTS = Experts(hidden=32, inner=16, top_k=2, num_experts=4, layers=(1, 3))
SHAPE = BoxShape(max_rows=4, top_k=2, hidden=32, slots=2)
NAMES = ["expert-0", "expert-1"]
LAYER = 3
FOREVER = 1 << 40


def start(folder: str) -> list[ExpertProcess]:
    return [ExpertProcess(name, EXPERTS, Path(folder), "cpu", triton_interpreter.repair) for name in NAMES]


@pytest.fixture(autouse=True)
def as_workers_run() -> Iterator[None]:
    """Whose memory is then written in this mode only, also by the thread that watches for deaths."""
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def patient_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are interpreted on a busy machine may take longer than a worker that is not hung."""
    monkeypatch.setattr(dispatch, "DISPATCH_DEADLINE_S", START_S)


@pytest.fixture(scope="module")
def experts() -> Iterator[list[ExpertProcess]]:
    with TemporaryDirectory() as folder:
        made = start(folder)
        yield made
        for expert in made:
            expert.close()


@pytest.fixture
def attention(experts: list[ExpertProcess]) -> Iterator[Attention]:
    made = linked(experts)
    yield made
    made.close()


def linked(experts: list[ExpertProcess], name: str = "attention-0") -> Attention:
    made = Attention(experts, EXPERTS, SHAPE, "cpu", name, FOREVER)
    made.share(EXPERTS.map(NAMES, replicas=2))
    assert made.experts.can_be_noted
    return made


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return EXPERTS.batch(rows, CPU, seed)


def local(x: Tensor, ids: Tensor, layer: int = LAYER) -> Tensor:
    made = EXPERTS.local(CPU)
    return made.collect(made.dispatch(layer, x, ids))


def stop_asleep(expert: ExpertProcess, askers: list[Attention]) -> None:
    """Not while it looks at one doorbell after the other: it would miss the first one's ring and see the second's."""

    def is_asleep() -> bool:
        return all(asker.box(0).bells.words[ASLEEP] for asker in askers)

    while True:
        askers[0].wait(is_asleep)
        expert.signal(signal.SIGSTOP)
        if is_asleep():
            return
        expert.signal(signal.SIGCONT)


def test_the_peer_table_has_a_column_for_everybody_who_may_be_asked() -> None:
    assert MAX_PEERS == MAX_MAIL_PEERS


def test_the_bits_of_local_experts_however_many_rows_and_posts(attention: Attention) -> None:
    for rows, layer in ((1, 1), (4, 3), (11, 3)):
        x, ids = batch(rows, rows)
        assert torch.equal(attention.run(layer, x, ids), local(x, ids, layer))
    device = attention.experts
    batches = [batch(4, 1), batch(9, 2)]
    device.phase = 1
    handles = [device.dispatch(LAYER, x, ids) for x, ids in batches]
    for handle, (x, ids) in zip(handles, batches, strict=True):
        assert torch.equal(device.collect(handle), local(x, ids))
    assert device.is_settled()
    assert device.take_failed() == {}


def test_owners_are_swapped_between_steps_and_no_bit_changes(
    attention: Attention, experts: list[ExpertProcess]
) -> None:
    x, ids = batch(4)
    expected = local(x, ids)
    assert attention.experts._peers is not None
    tables = attention.experts._peers.tables
    addresses = tables.peers.data_ptr(), tables.owners.data_ptr()
    for epoch, names in ((2, NAMES[:1]), (3, NAMES[1:]), (4, NAMES[::-1])):
        before = [expert.counts() for expert in experts]
        attention.set_map(EXPERTS.map(names, len(names), epoch))
        assert torch.equal(attention.run(LAYER, x, ids), expected)
        gained = [expert.counts()["hops"] - old.get("hops", 0) for expert, old in zip(experts, before, strict=True)]
        assert gained == [NAMES[0] in names, NAMES[1] in names]
    assert (tables.peers.data_ptr(), tables.owners.data_ptr()) == addresses


def test_posts_of_two_attention_workers_are_computed_as_one_batch(experts: list[ExpertProcess]) -> None:
    askers = [linked(experts, f"attention-{index}") for index in range(2)]
    batches = [batch(3, 1), batch(4, 2)]
    before = experts[0].counts()
    for asker in askers:
        asker.set_map(EXPERTS.map(NAMES[:1], 1, 2))
    stop_asleep(experts[0], askers)
    for asker in askers:
        asker.experts.phase = 0
    handles = [asker.experts.dispatch(LAYER, x, ids) for asker, (x, ids) in zip(askers, batches, strict=True)]
    experts[0].signal(signal.SIGCONT)
    for asker, handle, (x, ids) in zip(askers, handles, batches, strict=True):
        assert torch.equal(asker.experts.collect(handle), local(x, ids))
        assert asker.experts.is_settled()
    after = experts[0].counts()
    assert [after[key] - before.get(key, 0) for key in ("hops", "batches")] == [2, 1]
    for asker in askers:
        asker.close()


def test_a_worker_that_sleeps_is_woken_by_the_next_pass(attention: Attention) -> None:
    x, ids = batch(4)
    attention.run(LAYER, x, ids)
    attention.wait(lambda: all(attention.box(owner).bells.words[ASLEEP] for owner in range(2)))
    assert torch.equal(attention.run(LAYER, x, ids), local(x, ids))


def test_nobody_is_kept_awake_by_passes_that_do_not_come_by_mail(attention: Attention) -> None:
    attention.set_map(EXPERTS.map([*NAMES, "expert-2"], 1, 2))  # who is linked with nobody
    assert not attention.experts.can_be_noted
    attention.experts.phase = 1
    assert not any(attention.box(owner).bells.words[BUSY] for owner in range(2))
    attention.set_map(EXPERTS.map(NAMES, 2, 3))
    attention.experts.phase = 1
    assert all(attention.box(owner).bells.words[BUSY] for owner in range(2))
    assert attention.experts.is_settled()


def test_a_silent_worker_is_given_up_and_what_it_answers_later_is_not_read(
    attention: Attention, experts: list[ExpertProcess]
) -> None:
    x, ids = batch(4)
    attention.experts._polls = 100
    experts[0].signal(signal.SIGSTOP)
    attention.set_map(EXPERTS.map(NAMES[:1], 1, 2))
    device = attention.experts
    device.phase = 0
    handle = device.dispatch(LAYER, x, ids)
    assert device.is_whole
    assert not device.collect(handle).any()
    assert not device.is_whole
    late = attention.peers[0]
    attention.set_map(EXPERTS.map(NAMES, 2, 3))
    assert "did not answer" in str(attention.links[NAMES[0]].closed)
    assert device.is_whole
    device._polls = FOREVER
    experts[0].signal(signal.SIGCONT)
    for _ in range(3):
        assert torch.equal(attention.run(LAYER, x, ids), local(x, ids))
    assert late not in attention.peers


def test_a_worker_dies_while_it_is_waited_for_and_the_pass_is_run_again_elsewhere() -> None:
    with TemporaryDirectory() as folder:
        experts = start(folder)
        attention = linked(experts)
        x, ids = batch(4)
        expected = local(x, ids)
        device = attention.experts
        experts[0].signal(signal.SIGSTOP)
        device.phase = 0
        handle = device.dispatch(LAYER, x, ids)
        killer = threading.Thread(target=experts[0].signal, args=(signal.SIGKILL,))
        killer.start()
        device.collect(handle)
        assert not device.is_settled()
        killer.join()
        assert torch.equal(attention.run(LAYER, x, ids), expected)
        assert device.num_redone == 1
        assert device.can_be_noted
        assert device._peers is not None
        kept = device._peers._remains._of
        assert list(kept) == [experts[0].process.pid]
        experts[0].process.join()
        experts[1].signal(signal.SIGKILL)
        assert not attention.run(LAYER, x, ids).any()
        assert list(kept) == [experts[1].process.pid]
        assert not device.can_be_noted
        assert sorted(device.take_failed()) == [0, 1, 2, 3]
        attention.close()
        for expert in experts:
            expert.close()


def test_who_lacks_an_expert_of_the_map_is_asked_over_its_link(experts: list[ExpertProcess]) -> None:
    attention = Attention(experts, EXPERTS, SHAPE, "cpu", polls=FOREVER)
    attention.share(replace(EXPERTS, layers=(1, 3, 5)).map(NAMES, 2))
    x, ids = batch(4)
    assert attention.experts.can_be_noted
    assert not attention.run(5, x, ids).any()
    assert sorted(attention.experts.take_failed()) == [0, 1, 2, 3]
    assert not attention.experts.can_be_noted
    assert torch.equal(attention.run(LAYER, x, ids), local(x, ids))
    assert [link.closed for link in attention.links.values()] == [None, None]
    attention.close()


def test_who_has_a_mailbox_of_another_shape_is_reached_over_links(experts: list[ExpertProcess]) -> None:
    shape = BoxShape(max_rows=4, top_k=3, hidden=32, slots=1)
    attention = Attention(experts, EXPERTS, shape, "cpu")
    attention.set_map(EXPERTS.map(NAMES, 2))
    x, ids = batch(4)
    assert torch.equal(attention.run(LAYER, x, ids), local(x, ids))
    assert not attention.experts.can_be_noted
    attention.close()
