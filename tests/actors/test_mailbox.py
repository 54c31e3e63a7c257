"""Memory that two processes share: how it is told of, found again and let go."""

from __future__ import annotations

import os

import pytest
import torch
from leftovers import open_fds

from braid.actors.mailbox import PAGE_BYTES, Box, BoxShape, DevicePages, HostPages, accept, accepted, make_pages, offer
from braid.actors.messages import pack, unpack

CPU = torch.device("cpu")
SHAPE = BoxShape(max_rows=3, top_k=2, hidden=5, slots=2)


def both_ends() -> tuple[Box, Box]:
    replies = make_pages(SHAPE.reply_bytes, CPU)
    theirs, answer = accept(offer(SHAPE, replies), CPU)
    return accepted(answer, SHAPE, replies, CPU), theirs


def test_both_ends_see_the_same_memory_and_leave_nothing_behind() -> None:
    before = open_fds()
    ours, theirs = both_ends()
    for slot in range(SHAPE.slots):
        ours.x(slot).fill_(slot + 1)
        theirs.rows(slot).fill_(slot + 7)
    for slot in range(SHAPE.slots):
        assert torch.equal(theirs.x(slot), torch.full((3, 5), slot + 1).bfloat16())
        assert torch.equal(ours.rows(slot), torch.full((6, 5), slot + 7).bfloat16())
    ours.bells.words[1] = 5
    assert theirs.bells.words[1] == 5
    assert ours.process == theirs.process == os.getpid()
    for box in (ours, theirs):
        box.close()
        box.close()
    assert not open_fds() - before


def test_the_parts_of_a_box_do_not_overlap() -> None:
    box, _ = both_ends()
    x, ids, bells, rows, flags = box.addresses()
    assert x == box.x(0).data_ptr()
    assert rows == box.rows(0).data_ptr()
    assert ids >= box.x(1).data_ptr() + box.x(1).nbytes
    assert box.ids_address(1) + 4 * SHAPE.max_pairs <= x + SHAPE.inbox_bytes
    assert flags >= box.rows(1).data_ptr() + box.rows(1).nbytes
    assert box.flag_address(1) + 8 <= rows + SHAPE.reply_bytes
    assert bells == box.bells.address


@pytest.mark.parametrize(
    "shape", [(0, 2, 5, 2), (1 << 16, 2, 5, 2), (3, 0, 5, 2), (3, 2, 5, 9), (65535, 64, 1 << 20, 8)], ids=str
)
def test_a_box_that_cannot_be_is_refused(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="mailbox"):
        BoxShape(*shape)


@pytest.mark.parametrize("change", ["nonce", "size", "fd"])
def test_memory_that_is_not_what_was_offered_is_not_used(change: str) -> None:
    pages = HostPages.make(PAGE_BYTES, CPU)
    pid, fd, nonce = pages.tell()
    before = open_fds()
    words = {"nonce": [pid, fd, nonce + 1], "size": [pid, fd, nonce], "fd": [pid, 1 << 20, nonce]}[change]
    with pytest.raises((OSError, ValueError)):
        HostPages.open(words, 2 * PAGE_BYTES if change == "size" else PAGE_BYTES, CPU)
    assert not open_fds() - before
    pages.close()


def test_a_handle_is_opened_on_our_device_and_without_the_event_of_its_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def open_handle(*words: object) -> torch.UntypedStorage:
        opened.extend(words)
        return torch.zeros(4096, dtype=torch.uint8).untyped_storage()

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", open_handle)
    told = [5, b"handle", 4096, 512, b"counter", 7, b"event", True]
    assert DevicePages.open(told, 4096, CPU).bytes.shape == (4096,)
    assert opened == [0, b"handle", 4096, 512, b"counter", 7, b"event", False]
    with pytest.raises(ValueError, match="4096 bytes of device memory were offered, 4097 are needed"):
        DevicePages.open(told, 4097, CPU)


def test_an_offer_that_cannot_be_taken_costs_nothing() -> None:
    replies = make_pages(SHAPE.reply_bytes, CPU)
    body = unpack(offer(SHAPE, replies))
    before = open_fds()
    offers: list[dict[str, object]] = [body | {"replies": [1, 2]}, body | {"shape": {"max_rows": 1}}, {}]
    for broken in offers:
        with pytest.raises((OSError, ValueError, KeyError, TypeError)):
            accept(pack(broken), CPU)
    assert not open_fds() - before
