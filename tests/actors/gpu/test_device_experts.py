"""Rows through shared memory between real processes: the bits of local experts, through swaps and deaths."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from mail_worker import LAYERS, NUM_EXPERTS, SHAPE, TOP_K, Attention, ExpertProcess, expert_map, weights
from torch import Tensor

from braid.actors.mailbox import ASLEEP, BoxShape
from braid.model.experts import LocalExperts

NAMES = ["expert-0", "expert-1"]
LAYER = LAYERS[1]


def start(folder: str) -> list[ExpertProcess]:
    return [ExpertProcess(name, tuple(range(NUM_EXPERTS)), Path(folder)) for name in NAMES]


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
    made = Attention(experts, name)
    made.set_map(expert_map(NAMES, replicas=2))
    made.wait(lambda: all(peer is not None and peer.has_mail for peer in made.peers))
    assert made.device.can_be_noted
    return made


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(rows)])
    return torch.randn(rows, SHAPE.hidden, generator=generator).bfloat16(), ids


def local(x: Tensor, ids: Tensor, layer: int = LAYER) -> Tensor:
    made = LocalExperts(weights(tuple(range(NUM_EXPERTS))))
    return made.collect(made.dispatch(layer, x, ids))


def forward(attention: Attention, x: Tensor, ids: Tensor, layer: int = LAYER) -> Tensor:
    """One pass, and again as long as it lost rows."""
    device = attention.device
    while True:
        device.phase = 0
        rows: Tensor = device.collect(device.dispatch(layer, x, ids)).clone()
        if device.is_settled():
            return rows


def test_the_bits_of_local_experts_however_many_rows_and_posts(attention: Attention) -> None:
    for rows, layer in ((1, 1), (4, 3), (11, 3)):
        x, ids = batch(rows, rows)
        assert torch.equal(forward(attention, x, ids, layer), local(x, ids, layer))
    device = attention.device
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
    assert attention.device._peers is not None
    tables = attention.device._peers.tables
    addresses = tables.peers.data_ptr(), tables.owners.data_ptr()
    for epoch, names in ((2, NAMES[:1]), (3, NAMES[1:]), (4, NAMES[::-1])):
        before = [expert.counts() for expert in experts]
        attention.set_map(expert_map(names, len(names), epoch))
        assert torch.equal(forward(attention, x, ids), expected)
        gained = [expert.counts()["hops"] - old.get("hops", 0) for expert, old in zip(experts, before, strict=True)]
        assert gained == [NAMES[0] in names, NAMES[1] in names]
    assert (tables.peers.data_ptr(), tables.owners.data_ptr()) == addresses


def test_posts_of_two_attention_workers_are_computed_as_one_batch(experts: list[ExpertProcess]) -> None:
    askers = [linked(experts, f"attention-{index}") for index in range(2)]
    batches = [batch(3, 1), batch(4, 2)]
    before = experts[0].counts()
    for asker in askers:
        asker.set_map(expert_map(NAMES[:1], 1, 2))
        asker.device.phase = 0
    experts[0].signal(signal.SIGSTOP)
    handles = [asker.device.dispatch(LAYER, x, ids) for asker, (x, ids) in zip(askers, batches, strict=True)]
    experts[0].signal(signal.SIGCONT)
    for asker, handle, (x, ids) in zip(askers, handles, batches, strict=True):
        assert torch.equal(asker.device.collect(handle), local(x, ids))
        assert asker.device.is_settled()
    after = experts[0].counts()
    assert [after[key] - before.get(key, 0) for key in ("hops", "batches")] == [2, 1]
    for asker in askers:
        asker.close()


def test_a_worker_that_sleeps_is_woken_by_the_next_pass(attention: Attention) -> None:
    x, ids = batch(4)
    forward(attention, x, ids)
    attention.wait(lambda: all(attention.box(owner).bells.words[ASLEEP] for owner in range(2)))
    assert torch.equal(forward(attention, x, ids), local(x, ids))


def test_a_silent_worker_is_given_up_and_what_it_answers_later_is_not_read(
    attention: Attention, experts: list[ExpertProcess]
) -> None:
    x, ids = batch(4)
    attention.device._polls = 100
    experts[0].signal(signal.SIGSTOP)
    attention.set_map(expert_map(NAMES[:1], 1, 2))
    device = attention.device
    device.phase = 0
    assert not device.collect(device.dispatch(LAYER, x, ids)).any()
    late = attention.peers[0]
    attention.set_map(expert_map(NAMES, 2, 3))
    assert "did not answer" in str(attention.links[NAMES[0]].closed)
    device._polls = 1 << 40
    experts[0].signal(signal.SIGCONT)
    for _ in range(3):
        assert torch.equal(forward(attention, x, ids), local(x, ids))
    assert late not in attention.peers


def test_a_worker_dies_while_it_is_waited_for_and_the_pass_is_run_again_elsewhere() -> None:
    with TemporaryDirectory() as folder:
        experts = start(folder)
        attention = linked(experts)
        x, ids = batch(4)
        expected = local(x, ids)
        device = attention.device
        experts[0].signal(signal.SIGSTOP)
        device.phase = 0
        handle = device.dispatch(LAYER, x, ids)
        killer = threading.Thread(target=experts[0].signal, args=(signal.SIGKILL,))
        killer.start()
        device.collect(handle)
        assert not device.is_settled()
        killer.join()
        assert torch.equal(forward(attention, x, ids), expected)
        assert device.num_redone == 1
        assert device.can_be_noted
        experts[1].signal(signal.SIGKILL)
        assert not forward(attention, x, ids).any()
        assert not device.can_be_noted
        assert sorted(device.take_failed()) == [0, 1, 2, 3]
        attention.close()
        for expert in experts:
            expert.close()


def test_who_has_a_mailbox_of_another_shape_is_reached_over_links(experts: list[ExpertProcess]) -> None:
    attention = Attention(experts, shape=BoxShape(max_rows=4, top_k=TOP_K + 1, hidden=SHAPE.hidden, slots=1))
    attention.set_map(expert_map(NAMES, 2))
    x, ids = batch(4)
    assert torch.equal(forward(attention, x, ids), local(x, ids))
    assert not attention.device.can_be_noted
    attention.close()
