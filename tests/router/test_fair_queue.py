from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.router.fair_queue import FairQueue


def queue_of(*items: tuple[str, int, str]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for item, priority, caller in items:
        queue.push(item, priority, caller)
    return queue


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_callers_take_turns_and_keep_their_own_order() -> None:
    queue = queue_of(("a1", 0, "a"), ("a2", 0, "a"), ("a3", 0, "a"), ("b1", 0, "b"), ("c1", 0, "c"), ("b2", 0, "b"))
    assert list(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert drained(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert queue.peek() is None


def test_a_lower_priority_number_is_served_first() -> None:
    queue = queue_of(("late", 3, "a"), ("default", 0, "a"), ("urgent", -2, "b"), ("default too", 0, "b"))
    assert drained(queue) == ["urgent", "default", "default too", "late"]


def test_what_comes_back_goes_first_and_costs_its_caller_no_turn() -> None:
    queue = queue_of(("a1", 0, "a"), ("b1", 0, "b"), ("b2", 0, "b"), ("urgent", -1, "b"))
    queue.put_back("newer", 0, "b")
    queue.put_back("older", 0, "b")
    assert drained(queue) == ["urgent", "older", "newer", "a1", "b1", "b2"]


def test_a_caller_that_floods_makes_another_wait_for_one_request_only() -> None:
    queue = queue_of(*[(f"flood {i}", 0, "flood") for i in range(1000)])
    served = [queue.pop()]
    queue.push("polite 0", 0, "polite")
    for turn in range(20):
        served.append(queue.pop())
        if served[-1].startswith("polite"):
            queue.push(f"polite {turn + 1}", 0, "polite")
    assert sum(name.startswith("polite") for name in served) == 10


def test_in_a_full_queue_the_newest_of_the_greediest_caller_makes_room() -> None:
    queue = queue_of(*[(f"a{i}", 0, "a") for i in range(3)], ("b0", 0, "b"), ("b1", 0, "b"))
    assert queue.crowding_out("c") == "a2"
    assert queue.crowding_out("b") is None  # 3 and 2: b would have as many then
    assert queue.crowding_out("a") is None
    queue.remove("a2")
    assert queue.crowding_out("b") is None


def test_in_a_full_queue_a_worse_priority_makes_room_and_a_better_one_never() -> None:
    queue = queue_of(("urgent", -1, "a"), ("a0", 0, "a"), ("late 0", 2, "b"), ("late 1", 2, "a"), ("late 2", 2, "a"))
    queue.put_back("late, back", 2, "b")
    assert queue.crowding_out("a", 0) == "late 2"
    assert queue.crowding_out("a", 3) is None
    queue.remove("late 0")
    assert queue.crowding_out("c", 2) == "late 2"
    for item in ("late, back", "late 1", "late 2"):
        queue.remove(item)
    assert queue.crowding_out("b", -1) == "a0"
    queue.remove("a0")
    assert queue.crowding_out("b", -1) is None
    queue.remove("urgent")
    assert queue.crowding_out("b", -1) is None


def test_waiting_twice_is_a_bug() -> None:
    queue = queue_of(("a", 0, ""))
    with pytest.raises(AssertionError, match="'a' waits already"):
        queue.put_back("a", 1)


steps = st.lists(
    st.tuples(st.sampled_from(["push", "back", "pop", "remove"]), st.integers(-1, 1), st.sampled_from("ab"))
)


@given(steps)
def test_the_order_it_tells_is_the_order_it_serves(steps: list[tuple[str, int, str]]) -> None:
    queue: FairQueue[str] = FairQueue()
    for number, (step, priority, caller) in enumerate(steps):
        told = list(queue)
        assert len(told) == len(queue)
        assert queue.peek() == (told[0] if told else None)
        if step == "push":
            queue.push(str(number), priority, caller)
        elif step == "back":
            queue.put_back(str(number), priority, caller)
        elif told and step == "pop":
            assert queue.pop() == told[0]
            assert list(queue) == told[1:]
        elif told:
            queue.remove(told[number % len(told)])
            assert told[number % len(told)] not in queue
    assert list(queue) == drained(queue)
