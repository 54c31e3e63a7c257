from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from braid.router.placement import DecodeCandidate, DecodeLedger, Placement, blocks_needed, place


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "blocks"), [(64, 1, 1), (64, 2, 2), (1, 64, 1), (1, 65, 2), (1, 0, 1), (128, 0, 2)]
)
def test_the_last_token_needs_no_place_in_the_cache(num_prompt: int, max_tokens: int, blocks: int) -> None:
    assert blocks_needed(num_prompt, max_tokens, 64) == blocks


def test_shortest_queue_and_most_room() -> None:
    decode = [DecodeCandidate("d0", 3), DecodeCandidate("d1", 9), DecodeCandidate("d2", 9, running=1)]
    assert place({"p0": 50, "p1": 20, "p2": 20}, decode, 3) == Placement("p1", "d1")


def test_a_worker_of_both_roles_computes_what_it_decodes() -> None:
    decode = [DecodeCandidate("b0", 4), DecodeCandidate("b1", 5)]
    assert place({"b0": 0, "b1": 900}, decode, 4) == Placement("b1", "b1")
    even = [DecodeCandidate("b0", 4), DecodeCandidate("b1", 4)]
    assert place({"b0": 900, "b1": 0}, even, 4) == Placement("b1", "b1")


@pytest.mark.parametrize("num_blocks", [4, 5])
def test_no_room_is_no_placement(num_blocks: int) -> None:
    placed = place({"p": 0}, [DecodeCandidate("d", 4)], num_blocks)
    assert (placed is None) == (num_blocks == 5)
    assert place({}, [DecodeCandidate("d", 4)], 1) is None


def test_no_blocks_need_no_decode_worker() -> None:
    assert place({"p0": 1, "p1": 0}, [], 0) == Placement("p1", "p1")
    assert place({}, [DecodeCandidate("d", 4)], 0) is None


numbers = st.integers(-5, 40)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.dictionaries(st.sampled_from("abcd"), numbers), st.dictionaries(st.sampled_from("cdef"), numbers), numbers)
def test_places_whenever_somebody_has_room_and_only_then(
    queues: dict[str, int], free: dict[str, int], num_blocks: int
) -> None:
    placed = place(queues, [DecodeCandidate(name, blocks) for name, blocks in free.items()], max(num_blocks, 1))
    has_room = bool(queues) and any(blocks >= max(num_blocks, 1) for blocks in free.values())
    assert (placed is not None) == has_room
    if placed is not None:
        assert free[placed.decode] == max(free.values())
        assert placed.prefill in queues


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
