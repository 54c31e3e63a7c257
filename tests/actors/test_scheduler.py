"""Continuous batching decided without a clock, a socket or a tensor."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.actors.scheduler import Chunk, Scheduler
from braid.actors.sequence import Sequence
from braid.model.kv_cache import BLOCK_SIZE, BlockAllocator
from braid.model.sampling_params import SamplingParams


def sequence(name: str, prompt: int, max_tokens: int = 8, target: str = "") -> Sequence:
    return Sequence(name, "front-0", target, list(range(prompt)), prompt, SamplingParams(max_tokens), {}, 1e12)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(BlockAllocator(8), max_sequences=3, max_batch_tokens=100, max_waiting=4)
    yield made
    made.check()
    for left in made.all():
        made.finish(left)
    assert made.allocator.num_free == made.allocator.num_total


def prompts(scheduler: Scheduler) -> list[Chunk]:
    return [chunk for chunk in scheduler.plan() if not chunk.absorbed]


def decoding(scheduler: Scheduler) -> list[str]:
    return [chunk.sequence.id for chunk in scheduler.plan() if chunk.absorbed]


def run(scheduler: Scheduler, plan_chunks: list[tuple[str, int, int]]) -> None:
    """Plans a step, compares its prompt chunks with what is expected, and pretends it ran."""
    chunks = prompts(scheduler)
    assert [(c.sequence.id, c.start, c.num) for c in chunks] == plan_chunks
    for chunk in chunks:
        scheduler.computed(chunk)
        if chunk.is_last:
            chunk.sequence.tokens.append(0)
            scheduler.start_decode(chunk.sequence)


def test_prompts_share_the_token_budget_in_order_of_arrival(scheduler: Scheduler) -> None:
    scheduler.submit(sequence("a", 60))
    scheduler.submit(sequence("b", 130))
    run(scheduler, [("a", 0, 60), ("b", 0, 40)])
    run(scheduler, [("b", 40, 64)])  # a decodes: the prompt gets a block's worth of rows at most
    run(scheduler, [("b", 104, 26)])
    assert decoding(scheduler) == ["a", "b"]


def test_a_decoding_sequence_always_runs_before_prompts(scheduler: Scheduler) -> None:
    scheduler.submit(sequence("a", 10))
    run(scheduler, [("a", 0, 10)])
    scheduler.submit(sequence("b", 300))
    plan = scheduler.plan()
    assert [(c.sequence.id, c.num, c.absorbed) for c in plan] == [("a", 1, True), ("b", 64, False)]


def test_a_prompt_that_does_not_fit_waits_and_keeps_its_place(scheduler: Scheduler) -> None:
    scheduler.submit(sequence("a", 6 * BLOCK_SIZE, target="decode-0"))
    scheduler.submit(sequence("b", 3 * BLOCK_SIZE, target="decode-0"))
    scheduler.submit(sequence("c", 1, target="decode-0"))
    assert [c.sequence.id for c in prompts(scheduler)] == ["a"]
    assert [s.id for s in scheduler.waiting] == ["b", "c"]  # c would fit, and does not overtake
    scheduler.finish(scheduler.prefilling[0])
    assert [c.sequence.id for c in prompts(scheduler)] == ["b"]


def test_refuses_what_can_never_fit_and_what_the_queue_cannot_hold(scheduler: Scheduler) -> None:
    assert not scheduler.submit(sequence("giant", 9 * BLOCK_SIZE))
    assert not scheduler.submit(sequence("long", BLOCK_SIZE, max_tokens=8 * BLOCK_SIZE))
    assert [scheduler.submit(sequence(str(i), 1)) for i in range(5)] == [True] * 4 + [False]


def test_reserves_for_a_remote_prompt_only_while_there_is_room(scheduler: Scheduler) -> None:
    taken = [sequence(str(i), BLOCK_SIZE) for i in range(4)]
    assert [scheduler.reserve(s) for s in taken] == [True, True, True, False]  # max_sequences
    scheduler.finish(taken[0])
    assert not scheduler.reserve(sequence("wide", 5 * BLOCK_SIZE))  # 4 of 8 blocks are free
    assert scheduler.reserve(taken[3])


def test_prompts_of_its_own_and_remote_ones_share_max_sequences(scheduler: Scheduler) -> None:
    assert scheduler.reserve(sequence("remote", 1))
    for name in "abc":
        scheduler.submit(sequence(name, 1))
    assert [chunk.sequence.id for chunk in prompts(scheduler)] == ["a", "b"]
    assert not scheduler.reserve(sequence("late", 1))


def test_a_remote_prompt_needs_no_room_for_its_answer_here(scheduler: Scheduler) -> None:
    assert scheduler.submit(sequence("a", 8 * BLOCK_SIZE, max_tokens=1000, target="decode-0"))
    assert prompts(scheduler)


def test_finishing_twice_is_a_bug_that_is_named(scheduler: Scheduler) -> None:
    one = sequence("a", 5)
    scheduler.submit(one)
    scheduler.plan()
    scheduler.finish(one)
    with pytest.raises(AssertionError, match="a finished twice"):
        scheduler.finish(one)


def take_token(scheduler: Scheduler, chunk: Chunk) -> None:
    one = chunk.sequence
    one.tokens.append(0)
    if one.target or one.num_generated >= one.params.max_tokens:
        scheduler.finish(one)
    elif not chunk.absorbed:
        scheduler.start_decode(one)


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40), st.booleans()), max_size=12))
def test_no_block_is_ever_lost_or_shared(requests: list[tuple[int, int, bool]]) -> None:
    scheduler = Scheduler(BlockAllocator(10), max_sequences=4, max_batch_tokens=64, max_waiting=8)
    for index, (prompt, max_tokens, is_remote) in enumerate(requests):
        scheduler.submit(sequence(str(index), prompt, max_tokens, "decode-0" if is_remote else ""))
    for _ in range(2000):
        plan = scheduler.plan()
        scheduler.check()
        assert sum(chunk.num_rows for chunk in plan) <= 64
        if not plan:
            break
        for chunk in plan:
            scheduler.computed(chunk)
            if chunk.is_last:
                take_token(scheduler, chunk)
    assert not scheduler.all()
    assert scheduler.allocator.num_free == 10
