"""The device-side dispatch between an attention side and two expert sides that take turns in one process."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from braid.kernels.gpu import mail

HIDDEN, TOP_K, EXPERTS, MAX_ROWS, SLOTS = 24, 3, 6, 5, 2
POLLS = 3
ABSENT = 5  # of every peer's stack


@dataclass
class Expert:
    """One peer's memory and ours for it; it computes x * (expert + 1)."""

    inbox: Tensor = field(default_factory=lambda: torch.full((SLOTS, MAX_ROWS, HIDDEN), torch.nan).bfloat16())
    ids: Tensor = field(default_factory=lambda: torch.full((SLOTS, MAX_ROWS, TOP_K), 99, dtype=torch.int32))
    bells: Tensor = field(default_factory=lambda: torch.zeros(SLOTS, dtype=torch.int64))
    replies: Tensor = field(default_factory=lambda: torch.full((SLOTS, MAX_ROWS * TOP_K, HIDDEN), torch.nan).bfloat16())
    flags: Tensor = field(default_factory=lambda: torch.zeros(SLOTS, dtype=torch.int64))

    def addresses(self) -> list[int]:
        return [memory.data_ptr() for memory in (self.inbox, self.ids, self.bells, self.replies, self.flags)]

    def job(self, slot: int, first: int = 0) -> list[int]:
        sequence = mail.bell_of(int(self.bells[slot]))[0]
        memory = (self.inbox, self.ids, self.replies, self.flags)
        x, ids, rows, flag = (part[slot].data_ptr() for part in memory)
        return [x, ids, rows, flag, first, sequence, 0, 0]


def rows_of(x: Tensor, experts: Tensor) -> Tensor:
    return (x.float()[:, None] * (experts[..., None] + 1)).bfloat16()


def answer(*posts: tuple[Expert, int], copies: bool) -> None:
    """Both ways that the expert side has: in place, or brought together and delivered."""
    jobs, num_rows = [], 0
    for expert, slot in posts:
        jobs.append(expert.job(slot, num_rows))
        num_rows += mail.bell_of(int(expert.bells[slot]))[3]
    table, local = torch.tensor(jobs), torch.arange(EXPERTS, dtype=torch.int32)
    local[ABSENT] = -1
    (first, slot), *_ = posts
    places = torch.full((num_rows, TOP_K), 77)
    x = torch.full((num_rows, HIDDEN), torch.nan).bfloat16() if copies else first.inbox[slot, :num_rows]
    mail.take_in(table, local, x, places, copies)
    out = torch.full((num_rows * TOP_K, HIDDEN), torch.nan).bfloat16() if copies else first.replies[slot]
    mine = places >= 0
    out[: num_rows * TOP_K].view(num_rows, TOP_K, HIDDEN)[mine] = rows_of(x, places)[mine]
    if copies:
        mail.deliver(table, out, places)
    mail.signal(table)


class Attention:
    def __init__(self, *experts: Expert) -> None:
        self.experts = experts
        self.peers = torch.zeros(mail.NUM_ADDRESSES, mail.MAX_PEERS, dtype=torch.int64)
        for index, expert in enumerate(experts):
            self.peers[:, 3 * index] = torch.tensor(expert.addresses())
        self.owners = torch.tensor([0, 3, 0, 3, 3, 0], dtype=torch.int32)
        self.owed = torch.zeros(SLOTS, mail.MAX_PEERS, dtype=torch.int32)
        self.sequence = torch.zeros(SLOTS, dtype=torch.int64)
        self.phase, self.loads = torch.ones(1, dtype=torch.int32), torch.zeros(EXPERTS, dtype=torch.int32)
        self.gone, self.failed, self.told = (torch.zeros(mail.MAX_PEERS, dtype=torch.int32) for _ in range(3))

    def post(self, x: Tensor, ids: Tensor, slot: int, layer: int = 7) -> None:
        mail.post(
            x, ids, layer, slot, MAX_ROWS, self.owners, self.peers, self.owed, self.sequence, self.phase, self.loads
        )

    def land(self, ids: Tensor, slot: int, polls: int = POLLS) -> Tensor:
        mail.await_rows(slot, self.peers, self.owed, self.sequence, self.gone, self.failed, self.told, polls)
        out = torch.full((ids.numel(), HIDDEN), torch.nan).bfloat16()
        mail.land(ids, slot, MAX_ROWS, self.owners, self.peers, self.failed, out)
        return out.view(*ids.shape, HIDDEN)


@pytest.fixture
def attention() -> Attention:
    return Attention(Expert(), Expert())


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(ABSENT, generator=generator)[:TOP_K] for _ in range(rows)])
    return torch.randn(rows, HIDDEN, generator=generator).bfloat16(), ids


@pytest.mark.parametrize("copies", [False, True])
def test_rows_go_to_their_owners_and_come_back_to_their_places(attention: Attention, copies: bool) -> None:
    for rows, slot in ((4, 0), (5, 1), (1, 0)):
        x, ids = batch(rows, rows)
        attention.post(x, ids, slot)
        for expert in attention.experts:
            assert mail.bell_of(int(expert.bells[slot]))[1:] == (1, 7, rows)
            answer((expert, slot), copies=copies)
        assert torch.equal(attention.land(ids, slot), rows_of(x, ids))
    assert not attention.told.any()
    assert attention.sequence.tolist() == [2, 1]
    assert attention.loads.sum() == 10 * TOP_K


def test_sequence_numbers_begin_anew_before_they_reach_a_words_sign(attention: Attention) -> None:
    last = 1 << 34
    attention.sequence.fill_(last - 1)
    x, ids = batch(2)
    for expected in (last, 1, 2):
        attention.post(x, ids, 0)
        assert attention.experts[0].bells[0] > 0
        for expert in attention.experts:
            assert mail.bell_of(int(expert.bells[0])) == (expected, 1, 7, 2)
            answer((expert, 0), copies=False)
        assert torch.equal(attention.land(ids, 0), rows_of(x, ids))


def test_a_peer_is_sent_only_what_is_its_own_and_rung_only_if_something_is(attention: Attention) -> None:
    x, ids = batch(2)[0], torch.tensor([[0, 2, 5], [-1, 0, 3]])
    attention.owners[5] = 0
    attention.post(x, ids, 0)
    first, second = attention.experts
    assert first.ids[0, :2].tolist() == [[0, 2, 5], [-1, 0, -1]]
    assert second.ids[0, :2].tolist() == [[-1, -1, -1], [-1, -1, 3]]
    assert torch.equal(first.inbox[0, :2], x)
    assert torch.equal(second.inbox[0, 1], x[1])
    assert second.inbox[0, 0].isnan().all()
    attention.post(x[:1], ids[:1], 1)
    assert second.bells[1] == 0
    assert first.bells[1] != 0


def test_posts_of_several_askers_are_one_batch() -> None:
    askers = [Attention(Expert()), Attention(Expert())]
    posts, batches = [], [batch(3, 1), batch(4, 2)]
    for asker, (x, ids) in zip(askers, batches, strict=True):
        asker.owners[:] = 0
        asker.post(x, ids, 1)
        posts.append((asker.experts[0], 1))
    answer(*posts, copies=True)
    for asker, (x, ids) in zip(askers, batches, strict=True):
        assert torch.equal(asker.land(ids, 1), rows_of(x, ids))
        assert not asker.told.any()


@pytest.mark.parametrize(("end", "why"), [("silent", mail.SILENT), ("gone", mail.GONE), ("refuses", mail.REFUSED)])
def test_a_peer_that_fails_costs_zeros_and_is_named_and_nobody_waits_for_it_again(
    attention: Attention, end: str, why: int
) -> None:
    x, ids = batch(4)
    good, bad = attention.experts
    if end == "refuses":
        attention.owners[ABSENT] = 3
        ids[1, 1] = ABSENT
    attention.post(x, ids, 0)
    answer((good, 0), copies=False)
    if end == "refuses":
        answer((bad, 0), copies=False)
    attention.gone[3] = int(end == "gone")
    rows = attention.land(ids, 0, polls=1 << 40 if end == "gone" else POLLS)
    is_good = attention.owners[ids] == 0
    assert torch.equal(rows[is_good], rows_of(x, ids)[is_good])
    assert not rows[~is_good].any()
    assert attention.told.tolist() == [why if peer == 3 else 0 for peer in range(mail.MAX_PEERS)]
    attention.post(x, ids, 1)
    answer((good, 1), copies=False)
    assert torch.equal(attention.land(ids, 1, polls=1 << 40)[is_good], rows[is_good])


def test_a_late_answer_is_not_taken_for_the_answer_to_a_later_post(attention: Attention) -> None:
    x, ids = batch(4)
    attention.post(x, ids, 0)
    _, late = attention.experts
    job = torch.tensor([late.job(0)])
    assert not attention.land(ids, 0)[attention.owners[ids] == 3].any()
    attention.failed.zero_()
    attention.post(x, ids, 0)
    answer((attention.experts[0], 0), copies=False)
    mail.signal(job)
    rows = attention.land(ids, 0)
    assert torch.equal(rows[attention.owners[ids] == 0], rows_of(x, ids)[attention.owners[ids] == 0])
    assert not rows[attention.owners[ids] == 3].any()


def test_a_peer_that_was_replaced_writes_into_memory_that_nobody_reads(attention: Attention) -> None:
    x, ids = batch(4)
    attention.post(x, ids, 0)
    good, old = attention.experts
    attention.land(ids, 0)
    new = Expert()
    attention.peers[:, 3] = torch.tensor(new.addresses())
    attention.failed.zero_()
    attention.post(x, ids, 0)
    for expert in (good, new):
        answer((expert, 0), copies=False)
    old.inbox[0] = 1.0
    answer((old, 0), copies=True)
    assert torch.equal(attention.land(ids, 0), rows_of(x, ids))


def test_two_posts_are_open_at_once(attention: Attention) -> None:
    batches = [batch(4, 1), batch(5, 2)]
    for slot, (x, ids) in enumerate(batches):
        attention.post(x, ids, slot)
    for slot in (1, 0):
        for expert in attention.experts:
            answer((expert, slot), copies=False)
    for slot, (x, ids) in enumerate(batches):
        assert torch.equal(attention.land(ids, slot), rows_of(x, ids))
