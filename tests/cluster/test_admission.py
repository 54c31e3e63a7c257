from __future__ import annotations

import random
from typing import Any

import pytest

from braid.actors.view import Role
from braid.cluster.admission import BUSY_PAUSE_S, Admission, Ticket
from braid.router.placement import Placement


def load_of(worker: str, free_blocks: int, total_blocks: int = 8, **more: Any) -> dict[str, Any]:
    load = {"worker": worker, "free_blocks": free_blocks, "total_blocks": total_blocks, "block_size": 64}
    load |= {"sequences": 0, "max_sequences": 64, "running": 0, "waiting": 0, "waiting_tokens": 0, "counters": {}}
    return load | more


def admission_of(max_waiting: int = 10, **workers: Role) -> Admission:
    admission = Admission(max_waiting)
    for name, role in workers.items():
        admission.link(name, role)
        admission.report(load_of(name, 8))
    return admission


def check_idle(admission: Admission) -> None:
    assert admission.waiting == []
    for worker in admission.workers.values():
        assert (worker.ledger.reserved, worker.ledger.unseen) == (0, 0)
        assert (worker.unprefilled_tokens, worker.uncached_tokens, worker.placed.total()) == (0, 0, 0)


def test_first_come_first_served_even_when_a_later_one_would_fit() -> None:
    admission = admission_of(p="prefill", d="decode")
    first, big, small = Ticket(1, 300, 10), Ticket(2, 300, 10), Ticket(3, 10, 10)
    for ticket in (first, big, small):
        assert admission.join(ticket, 0.0)
    assert first.placement == Placement("p", "d")  # 5 of 8 blocks
    assert admission.place_waiting(0.0) == []
    admission.release(first)
    assert admission.place_waiting(0.0) == [big, small]
    admission.release(big)
    admission.release(small)
    check_idle(admission)


def test_a_better_priority_goes_first_and_callers_take_turns() -> None:
    admission = admission_of(b="both")
    big = Ticket(0, 440, 60)  # 7 of 8 blocks
    admission.join(big, 0.0)
    flood = [Ticket(place, 100, 10, caller="a") for place in (1, 2, 3)]
    other, urgent = Ticket(4, 100, 10, caller="b"), Ticket(5, 100, 10, priority=-1)
    small = Ticket(6, 10, 10, priority=-2)
    for ticket in (*flood, other, urgent):
        assert admission.join(ticket, 0.0)
    assert admission.join(small, 0.0)
    assert small.placement is not None, "it fits, and nobody of its priority waits"
    assert admission.waiting == [urgent, flood[0], other, flood[1], flood[2]]
    admission.release(big)
    assert admission.place_waiting(0.0) == [urgent, flood[0], other]
    for ticket in (urgent, flood[0]):
        admission.rejoin(ticket)
    assert admission.waiting == [urgent, flood[0], flood[1], flood[2]]
    for ticket in (small, *admission.waiting, other):
        admission.release(ticket)
    check_idle(admission)


def test_a_full_queue_lets_go_of_the_newest_of_whoever_floods_it() -> None:
    admission = admission_of(max_waiting=3, b="both")
    admission.join(Ticket(0, 440, 60), 0.0)
    flood = [Ticket(place, 200, 10, caller="a") for place in (1, 2, 3)]
    for ticket in flood:
        assert admission.join(ticket, 0.0)
    newcomer = Ticket(4, 200, 10, caller="b")
    assert not admission.join(newcomer, 0.0)
    assert admission.crowded_out(newcomer) is flood[2]
    assert admission.crowded_out(Ticket(5, 200, 10, caller="a")) is None
    assert admission.crowded_out(Ticket(6, 200, 10, caller="a", priority=-1)) is flood[2]
    assert admission.crowded_out(Ticket(7, 200, 10, caller="b", priority=1)) is None


def test_only_those_who_must_wait_fill_the_queue() -> None:
    admission = admission_of(max_waiting=1, b="both")
    tickets = [Ticket(place, 100, 28) for place in range(6)]  # 2 of 8 blocks each
    assert [admission.join(ticket, 0.0) for ticket in tickets] == [True] * 5 + [False]
    assert admission.waiting == [tickets[4]]
    assert all(ticket.placement for ticket in tickets[:4])
    without = admission_of(max_waiting=0, b="both")
    assert [without.join(Ticket(place, 400, 10), 0.0) for place in range(2)] == [True, False]


def test_what_was_sent_counts_before_a_report_tells_it() -> None:
    admission = admission_of(p0="prefill", p1="prefill", d="decode")
    tickets = [Ticket(place, 60, 4) for place in range(4)]
    for ticket in tickets:
        admission.join(ticket, 0.0)
    admission.place_waiting(0.0)
    assert [ticket.placement for ticket in tickets] == [Placement(f"p{place % 2}", "d") for place in range(4)]
    for ticket in tickets:
        admission.note_token(ticket, ticket.placement.prefill if ticket.placement else "")
        admission.note_token(ticket, "d")
        admission.release(ticket)
        admission.release(ticket)
    check_idle(admission)


def test_a_token_of_the_decode_worker_does_not_say_that_the_first_one_has_left() -> None:
    admission = admission_of(p="prefill", d="decode")
    ticket = Ticket(1, 60, 4)
    admission.join(ticket, 0.0)
    admission.note_token(ticket, "d")
    assert ticket.depends_on("p")  # if it dies now, the token with index 0 will never come
    admission.note_token(ticket, "p")
    assert not ticket.depends_on("p")
    admission.release(ticket)
    check_idle(admission)


def test_busy_goes_back_to_its_old_place_and_the_worker_rests() -> None:
    admission = admission_of(b="both")
    first, second = Ticket(1, 10, 10), Ticket(2, 10, 10)
    admission.join(first, 0.0)
    admission.place_waiting(0.0)
    admission.rejoin(first)
    admission.pause("b", 0.0)
    admission.join(second, 0.0)
    assert admission.waiting == [first, second]
    assert admission.place_waiting(0.9 * BUSY_PAUSE_S) == []
    assert admission.place_waiting(BUSY_PAUSE_S) == [first, second]


def test_a_prompt_that_comes_while_every_worker_rests_still_finds_its_prefix() -> None:
    admission = admission_of(b0="both", b1="both")
    prompt = list(range(300))
    first, again = (Ticket(place, 300, 10, prompt) for place in range(2))
    admission.join(first, 0.0)
    assert first.placement == Placement("b0", "b0")
    admission.note_token(first, "b0")
    admission.release(first)
    for name in ("b0", "b1"):
        admission.pause(name, 0.0)
    assert admission.join(again, 0.0)
    assert again.placement is None
    admission.report(load_of("b1", 8, total_blocks=9))
    assert admission.place_waiting(BUSY_PAUSE_S) == [again]
    assert again.placement == Placement("b0", "b0")
    admission.release(again)
    check_idle(admission)


def test_a_death_concerns_who_still_needs_the_worker() -> None:
    admission = admission_of(p="prefill", d="decode")
    ticket, waiting = Ticket(1, 10, 10), Ticket(2, 10, 10)
    admission.join(ticket, 0.0)
    admission.place_waiting(0.0)
    assert (ticket.depends_on("p"), ticket.depends_on("d"), ticket.depends_on("x")) == (True, True, False)
    admission.note_token(ticket, "p")
    assert (ticket.depends_on("p"), ticket.depends_on("d")) == (False, True)
    assert not waiting.depends_on("p")
    admission.unlink("d")
    assert not admission.is_ready
    admission.release(ticket)
    check_idle(admission)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "told"),
    [
        (513, 1, "513 tokens, the largest prefill worker has room for 512"),
        (200, 314, "513 tokens, the largest decode worker has room for 512"),
        (200, 313, None),
        (512, 1, None),
    ],
)
def test_says_what_never_fits(num_prompt: int, max_tokens: int, told: str | None) -> None:
    why = admission_of(p="prefill", d="decode").why_never(Ticket(1, num_prompt, max_tokens))
    assert why is None if told is None else why is not None and told in why


def test_a_prompt_only_goes_where_it_fits() -> None:
    admission = admission_of(small="prefill", large="prefill", d="decode")
    admission.report(load_of("small", 1, total_blocks=1))
    admission.report(load_of("large", 8, waiting_tokens=900))
    ticket = Ticket(1, 65, 2)
    admission.join(ticket, 0.0)
    admission.place_waiting(0.0)
    assert ticket.placement == Placement("large", "d")


def test_an_answer_only_goes_where_all_of_it_fits() -> None:
    """The small worker has more room now, and would refuse it for ever."""
    admission = admission_of(p="prefill", small="decode", large="decode")
    admission.report(load_of("small", 4, total_blocks=4))
    admission.report(load_of("large", 3))
    ticket = Ticket(1, 65, 4 * 64)
    admission.join(ticket, 0.0)
    assert ticket.placement == Placement("p", "large")


def test_nobody_is_sent_to_a_decode_worker_whose_places_are_taken() -> None:
    admission = admission_of(p="prefill", d="decode")
    admission.report(load_of("d", 8, max_sequences=3))
    tickets = [Ticket(place, 10, 10) for place in range(5)]
    for ticket in tickets:
        assert admission.join(ticket, 0.0)
    assert admission.waiting == tickets[3:]
    admission.release(tickets[0])
    admission.report(load_of("d", 6, max_sequences=3, sequences=2))  # ours: they are not counted twice
    assert admission.place_waiting(0.0) == [tickets[3]]
    admission.release(tickets[1])
    admission.report(load_of("d", 5, max_sequences=3, sequences=3))  # another front end was faster
    assert admission.place_waiting(0.0) == []
    admission.report(load_of("d", 6, max_sequences=3, sequences=2))
    assert admission.place_waiting(0.0) == [tickets[4]]
    for ticket in tickets[2:]:
        admission.release(ticket)
    check_idle(admission)


def test_a_better_priority_is_sent_where_it_takes_the_place_of_a_worse_one() -> None:
    admission = admission_of(p="prefill", d="decode")
    admission.report(load_of("d", 8, max_sequences=2))
    for place in range(2):
        admission.join(Ticket(place, 10, 10, priority=place), 0.0)
    urgent, equal = Ticket(2, 10, 10, priority=0), Ticket(3, 10, 10, priority=0)
    admission.join(urgent, 0.0)
    assert urgent.placement == Placement("p", "d")
    admission.join(equal, 0.0)
    assert equal.placement is None, "whoever was worse has given way already"


def test_any_story_ends_with_nothing_reserved() -> None:
    """Random events, in any order: never more reserved than there is, nobody overtakes, nothing left at the end."""
    rng = random.Random(5)
    admission = admission_of(p0="prefill", p1="prefill", d0="decode", d1="decode")
    live: list[Ticket] = []
    for step in range(3000):
        event = rng.choice(["join", "join", "token", "release", "busy", "report", "pump"])
        placed = [ticket for ticket in live if ticket.placement is not None]
        if event == "join":
            ticket = Ticket(step, rng.randint(1, 300), rng.randint(1, 200))
            if admission.join(ticket, float(step)):
                live.append(ticket)
        elif event == "release" and live:
            admission.release(live.pop(rng.randrange(len(live))))
        elif event == "report":
            admission.report(load_of(rng.choice(["d0", "d1"]), rng.randint(0, 8)))
        elif event == "pump":
            admission.place_waiting(float(step))
        elif placed and event in ("token", "busy"):
            ticket = rng.choice(placed)
            assert ticket.placement is not None
            if event == "token":
                admission.note_token(ticket, rng.choice([ticket.placement.prefill, ticket.placement.decode]))
            elif not ticket.is_prefilled:
                admission.rejoin(ticket)
        orders = [ticket.order for ticket in admission.waiting]
        assert orders == sorted(orders)
        assert all(worker.ledger.reserved <= 8 for worker in admission.workers.values())
    for ticket in live:
        admission.release(ticket)
    check_idle(admission)
