from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from braid.router.placement import (
    DecodeCandidate,
    DecodeLedger,
    Placement,
    PrefillCandidate,
    blocks_at_first,
    place,
)


def queues(**tokens: int) -> list[PrefillCandidate]:
    return [PrefillCandidate(name, queued) for name, queued in tokens.items()]


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "blocks"), [(64, 1, 1), (64, 2, 2), (1, 64, 1), (1, 65, 1), (1, 0, 1), (128, 0, 2)]
)
def test_a_sequence_begins_with_its_prompt_and_one_token(num_prompt: int, max_tokens: int, blocks: int) -> None:
    assert blocks_at_first(num_prompt, max_tokens, 64) == blocks


def test_shortest_queue_and_most_room() -> None:
    decode = [DecodeCandidate("d0", 3), DecodeCandidate("d1", 9), DecodeCandidate("d2", 9, running=1)]
    assert place(queues(p0=50, p1=20, p2=20), decode, 100, 3) == Placement("p1", "d1")


def test_a_cached_prefix_is_worth_the_queue_that_it_saves() -> None:
    decode = [DecodeCandidate("d", 9)]
    for queued, chosen in ((1023, "p0"), (1025, "p1")):
        prefill = [PrefillCandidate("p0", queued, cached_tokens=1024), PrefillCandidate("p1")]
        assert place(prefill, decode, 2000, 3) == Placement(chosen, "d")


def test_what_a_decode_worker_holds_of_the_prompt_counts_as_room() -> None:
    decode = [DecodeCandidate("d0", 100), DecodeCandidate("d1", 90, cached_blocks=11)]
    assert place(queues(p=0), decode, 704, 12) == Placement("p", "d1")
    crowded = [DecodeCandidate("d0", 100), DecodeCandidate("d1", 80, cached_blocks=11)]
    assert place(queues(p=0), crowded, 704, 12) == Placement("p", "d0")


def test_everyone_who_runs_keeps_a_block_to_grow_into() -> None:
    assert place(queues(p=0), [DecodeCandidate("d", 10, running=7)], 64, 4) is None
    assert place(queues(p=0), [DecodeCandidate("d", 10, running=6)], 64, 4) == Placement("p", "d")


def test_a_worker_of_both_roles_decodes_what_it_computes() -> None:
    decode = [DecodeCandidate("b0", 4), DecodeCandidate("b1", 50)]
    assert place(queues(b0=0, b1=900), decode, 10, 4) == Placement("b0", "b0")
    assert place(queues(b0=0, b1=0), decode, 10, 4) == Placement("b1", "b1")
    busy = [DecodeCandidate("b0", 50, running=3), DecodeCandidate("b1", 4)]
    assert place(queues(b0=0, b1=190), busy, 10, 4) == Placement("b1", "b1")


@pytest.mark.parametrize("num_blocks", [4, 5])
def test_no_room_is_no_placement(num_blocks: int) -> None:
    placed = place(queues(p=0), [DecodeCandidate("d", 4)], 200, num_blocks)
    assert (placed is None) == (num_blocks == 5)
    assert place([], [DecodeCandidate("d", 4)], 1, 1) is None


def test_no_blocks_need_no_decode_worker() -> None:
    assert place(queues(p0=1, p1=0), [], 10, 0) == Placement("p1", "p1")
    assert place([], [DecodeCandidate("d", 4)], 10, 0) is None


numbers = st.integers(-5, 40)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.dictionaries(st.sampled_from("abcd"), numbers), st.dictionaries(st.sampled_from("cdef"), numbers), numbers)
def test_places_whenever_somebody_has_room_and_only_then(
    queued: dict[str, int], free: dict[str, int], num_blocks: int
) -> None:
    decode = [DecodeCandidate(name, blocks) for name, blocks in free.items()]
    placed = place(queues(**queued), decode, 10, max(num_blocks, 1))
    has_room = bool(queued) and any(blocks >= max(num_blocks, 1) for blocks in free.values())
    assert (placed is not None) == has_room
    assert placed == place(queues(**queued)[::-1], decode[::-1], 10, max(num_blocks, 1)), "ties are stable"
    if placed is not None:
        assert free[placed.decode] >= max(num_blocks, 1)
        assert placed.prefill in queued
        assert placed.prefill == placed.decode or placed.decode not in queued


def test_the_ledger_counts_what_no_report_knows_yet() -> None:
    ledger = DecodeLedger(total_blocks=10, reported_free=10)
    ledger.reserve(4)
    assert ledger.free_blocks == 6
    ledger.reported_free = 6  # a report that knows of the reservation, before any token has shown that it does
    assert ledger.free_blocks == 2
    ledger.see(4)
    assert ledger.free_blocks == 6
    ledger.reported_free = 9  # another front end gave some back; ours still holds 4
    assert ledger.free_blocks == 6
    ledger.release(4, was_seen=True)
    assert ledger.free_blocks == 9
    ledger.reserve(2)
    ledger.release(2, was_seen=False)
    assert (ledger.reserved, ledger.unseen) == (0, 0)


def test_the_ledger_notices_a_release_too_many() -> None:
    with pytest.raises(AssertionError, match="2 more blocks released"):
        DecodeLedger().release(2, was_seen=True)
