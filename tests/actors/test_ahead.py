"""The next step planned while one runs: just what would be planned afterwards, or nothing."""

from __future__ import annotations

from scheduled_worker import ScheduledWorker, sequence_of

from braid.actors.ahead import look_ahead
from braid.actors.scheduler import Plan
from braid.actors.sequence import Sequence


def decoding(*max_tokens: int, num_prompt: int = 10, num_blocks: int = 20) -> ScheduledWorker:
    """Sequences that have their first token each."""
    worker = ScheduledWorker.of(num_blocks, len(max_tokens), max_batch_tokens=400, is_drafting=False)
    for number, count in enumerate(max_tokens):
        assert worker.scheduler.submit(sequence_of(f"s{number}", [number] * num_prompt, count))
    worker.step()
    return worker


def compute(worker: ScheduledWorker, plan: Plan) -> None:
    for chunk in plan:
        worker.scheduler.computed(chunk)
        chunk.sequence.tokens.append(7)


def test_a_steady_batch_is_planned_ahead_with_its_rows_and_blocks() -> None:
    worker = decoding(200, 200, num_prompt=63)
    first, second = worker.scheduler.decoding
    running = worker.scheduler.plan()
    assert [chunk.start for chunk in running] == [63, 63]
    ahead = look_ahead(worker.scheduler, running)
    assert ahead is not None
    assert [len(sequence.block_table) for sequence in (first, second)] == [2, 2]
    assert not ahead.holds(worker.scheduler)  # the step still runs
    compute(worker, running)
    first.tokens[-1], second.tokens[-1] = 11, 12
    assert ahead.holds(worker.scheduler)
    batch = ahead.batch(wants_hidden=False)
    assert batch.token_ids.tolist() == [11, 12]
    assert batch.logit_rows.tolist() == [0, 1]
    assert [(s.start, s.num, s.block_table, s.absorbed) for s in batch.segments] == [
        (64, 1, first.block_table, True),
        (64, 1, second.block_table, True),
    ]
    assert worker.scheduler.plan() == ahead.plan


def test_who_ends_by_length_is_not_in_the_next_step() -> None:
    worker = decoding(2, 9)
    running = worker.scheduler.plan()
    ahead = look_ahead(worker.scheduler, running)
    assert ahead is not None
    assert [chunk.sequence.id for chunk in ahead.plan] == ["s1"]
    worker.run()
    assert worker.seen_ahead > 6


def test_who_ends_by_a_token_or_a_cancel_makes_it_void() -> None:
    worker = decoding(9, 9)
    running = worker.scheduler.plan()
    ahead = look_ahead(worker.scheduler, running)
    compute(worker, running)
    worker.scheduler.finish(running[0].sequence)
    assert ahead is not None
    assert not ahead.holds(worker.scheduler)
    assert [chunk.sequence.id for chunk in worker.scheduler.plan()] == ["s1"]


def newcomer(worker: ScheduledWorker, **more: int) -> Sequence:
    made: Sequence = sequence_of("new", [5] * 20, **more)
    assert worker.scheduler.submit(made)
    return made


def test_whoever_finds_a_place_makes_it_void() -> None:
    worker = decoding(9, 9, 1)  # the third has ended: there is room for one
    running = worker.scheduler.plan()
    ahead = look_ahead(worker.scheduler, running)
    compute(worker, running)
    assert ahead is not None
    assert ahead.holds(worker.scheduler)
    newcomer(worker)
    assert not ahead.holds(worker.scheduler)
    assert look_ahead(worker.scheduler, running) is None


def test_whoever_finds_none_leaves_it_be_but_for_a_better_priority() -> None:
    worker = decoding(9, 9)
    running = worker.scheduler.plan()
    ahead = look_ahead(worker.scheduler, running)
    compute(worker, running)
    assert ahead is not None
    newcomer(worker)
    assert ahead.holds(worker.scheduler)
    assert worker.scheduler.plan() == ahead.plan
    newcomer(worker, priority=-1)
    assert not ahead.holds(worker.scheduler)
    assert [chunk.sequence.id for chunk in worker.scheduler.plan()] == ["s0", "new"]


def test_drafts_and_a_lack_of_blocks_are_not_looked_beyond() -> None:
    worker = decoding(100, 100, num_prompt=63, num_blocks=3)
    running = worker.scheduler.plan()
    worker.scheduler.decoding[0].drafts = [3]
    drafting = worker.scheduler.plan()
    assert look_ahead(worker.scheduler, drafting) is None
    held = [list(sequence.block_table) for sequence in worker.scheduler.decoding]
    assert look_ahead(worker.scheduler, running) is None  # two blocks are wanted, one is free
    assert [sequence.block_table for sequence in worker.scheduler.decoding] == held


def test_most_steps_of_a_steady_load_are_seen_ahead() -> None:
    worker = decoding(150, 150, 150)
    worker.run()
    assert worker.seen_ahead >= 145
