"""Blocks that are shared, taken away and computed again, without a tensor: the same answers, and always an end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduled_worker import ScheduledWorker, answer_to, sequence_of

from braid.actors.sequence import Sequence

LONG = [(17 * i) % 50 for i in range(1000)]


def submit(worker: ScheduledWorker, name: str, prompt: list[int], max_tokens: int = 8, **more: Any) -> Sequence:
    sequence: Sequence = sequence_of(name, prompt, max_tokens, **more)
    assert worker.scheduler.submit(sequence)
    return sequence


def assert_undisturbed(worker: ScheduledWorker, *sequences: Sequence) -> None:
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.num_prompt]
        assert worker.sent[sequence.id] == answer_to(prompt, sequence.params.max_tokens)
    assert worker.scheduler.allocator.num_free == worker.scheduler.allocator.num_total


def test_a_second_prompt_computes_only_what_the_first_has_not() -> None:
    worker = ScheduledWorker.of(20, max_batch_tokens=400)
    first = submit(worker, "first", LONG[:200])
    worker.run()
    same = submit(worker, "same", LONG[:200])
    assert [(chunk.start, chunk.num) for chunk in worker.step()] == [(192, 8)]
    other = submit(worker, "other", [*LONG[:130], 3, 4, 5])
    worker.run()
    assert (first.cached_tokens, same.cached_tokens, other.cached_tokens) == (0, 192, 128)
    assert_undisturbed(worker, first, same, other)
    counters = worker.scheduler.counters
    assert (counters["prefix_query_tokens"], counters["prefix_hit_tokens"]) == (533, 320)
    assert worker.scheduler.allocator.num_idle == 3


def test_the_last_prompt_token_is_always_computed() -> None:
    worker = ScheduledWorker.of(20)
    submit(worker, "first", LONG[:128])
    worker.run()
    same = submit(worker, "same", LONG[:128])
    worker.run()
    assert same.cached_tokens == 64
    assert_undisturbed(worker, same)


def test_two_that_run_together_share_what_the_first_has_finished() -> None:
    worker = ScheduledWorker.of(20, max_batch_tokens=128)
    first = submit(worker, "first", LONG[:300])
    worker.step()
    second = submit(worker, "second", LONG[:300])
    worker.step()
    worker.step()
    assert second.block_table[:4] == first.block_table[:4]
    worker.run()
    assert_undisturbed(worker, first, second)


def test_generated_tokens_are_nobodys_prompt() -> None:
    """They were computed in the other form: as a prompt they have other bits."""
    worker = ScheduledWorker.of(20)
    first = submit(worker, "first", LONG[:60], max_tokens=100)
    worker.run()
    second = submit(worker, "second", first.tokens[:150])
    worker.run()
    assert second.cached_tokens == 0
    assert_undisturbed(worker, second)


def test_the_newest_is_preempted_and_comes_back_with_the_same_tokens() -> None:
    worker = ScheduledWorker.of(6, max_batch_tokens=200)
    sequences = [submit(worker, name, [number] * 90, max_tokens=200) for number, name in enumerate("abc")]
    while not worker.scheduler.counters["preemptions"]:
        worker.step()
    assert sequences[2].state == "waiting"
    assert {sequence.state for sequence in sequences[:2]} == {"decode"}
    worker.run()
    assert worker.finished == ["a", "b", "c"]
    assert_undisturbed(worker, *sequences)


def test_a_newcomer_leaves_room_to_those_who_decode() -> None:
    worker = ScheduledWorker.of(8, max_batch_tokens=200)
    first = [submit(worker, name, [number] * 70, max_tokens=20) for number, name in enumerate("ab")]
    worker.step()
    late = submit(worker, "late", [3] * 200, max_tokens=20)  # 4 blocks are left, and these are what it needs
    worker.step()
    assert late.state == "waiting"
    worker.run()
    assert worker.scheduler.counters["preemptions"] == 0
    assert_undisturbed(worker, *first, late)


def test_a_replay_runs_in_few_steps_and_sends_nothing_twice() -> None:
    worker = ScheduledWorker.of(8, max_batch_tokens=128)
    first = submit(worker, "first", LONG[:100], max_tokens=300)
    second = submit(worker, "second", LONG[100:190], max_tokens=300)
    while second.state != "waiting":
        worker.step()
    num_known = len(second.tokens)
    while second in worker.scheduler.waiting:
        worker.step()
    plans = []
    while second.tokens[num_known:] == []:
        plans += [(chunk.num, chunk.absorbed) for chunk in worker.step() if chunk.sequence is second]
    num_generated = num_known - 90
    assert sum(num for num, absorbed in plans if absorbed) == num_generated
    assert len(plans) <= 3 + num_generated // 64
    worker.run()
    assert_undisturbed(worker, first, second)


def test_a_worse_priority_is_preempted_first_whenever_it_came() -> None:
    worker = ScheduledWorker.of(6, max_batch_tokens=200)
    worse = submit(worker, "worse", [1] * 90, max_tokens=200, priority=1)
    worker.step()
    better = [submit(worker, name, [2] * 90, max_tokens=200) for name in "ab"]
    while not worker.scheduler.counters["preemptions"]:
        worker.step()
    assert worse.state == "waiting"
    worker.run()
    assert worker.finished == ["a", "b", "worse"]
    assert_undisturbed(worker, worse, *better)


def test_a_short_prompt_does_not_wait_for_a_long_one_which_gets_half_of_the_rows() -> None:
    worker = ScheduledWorker.of(60, max_batch_tokens=64)
    submit(worker, "long", LONG[:900], max_tokens=1)
    worker.step()
    for number in range(4):
        submit(worker, f"short {number}", [number] * 20, max_tokens=1)
    assert {chunk.sequence.id: chunk.num for chunk in worker.step()} == {"long": 32, "short 0": 20, "short 1": 12}
    assert {chunk.sequence.id: chunk.num for chunk in worker.step()} == {
        "long": 32,
        "short 1": 8,
        "short 2": 20,
        "short 3": 4,
    }
    submit(worker, "longer", [9] * 950, max_tokens=1)
    assert {chunk.sequence.id: chunk.num for chunk in worker.step()} == {"long": 48, "short 3": 16}
    worker.run()
    assert worker.finished == [*(f"short {number}" for number in range(4)), "long", "longer"]


def test_a_better_priority_overtakes_whatever_is_left_of_others() -> None:
    worker = ScheduledWorker.of(60, max_batch_tokens=64)
    submit(worker, "long", LONG[:600], max_tokens=1)
    worker.step()
    submit(worker, "short", [8] * 10, max_tokens=1)
    submit(worker, "urgent", [9] * 800, max_tokens=1, priority=-1)
    assert {chunk.sequence.id: chunk.num for chunk in worker.step()} == {"long": 32, "urgent": 32}
    assert {chunk.sequence.id: chunk.num for chunk in worker.step()} == {"urgent": 64}
    worker.run()
    assert worker.finished == ["urgent", "short", "long"]


@pytest.mark.parametrize(("num_blocks", "max_sequences"), [(40, 2), (8, 4)])
def test_a_better_priority_takes_the_place_or_the_blocks_of_the_worst(num_blocks: int, max_sequences: int) -> None:
    worker = ScheduledWorker.of(num_blocks, max_sequences, max_batch_tokens=300)
    worse = submit(worker, "worse", [1] * 120, max_tokens=40, priority=1)
    worst = submit(worker, "worst", [2] * 120, max_tokens=40, priority=2)
    worker.step()
    urgent = submit(worker, "urgent", [3] * 200, max_tokens=40)
    worker.step()
    assert (worse.state, worst.state, urgent.state) == ("decode", "waiting", "prefill")
    assert worker.scheduler.counters["preemptions"] == 1
    worker.run()
    assert worker.finished[-1] == "worst"
    assert_undisturbed(worker, worse, worst, urgent)


def test_equals_are_not_preempted_and_nobody_is_in_vain() -> None:
    worker = ScheduledWorker.of(8, max_sequences=2, max_batch_tokens=300)
    equal = submit(worker, "equal", [0] * 250, max_tokens=30)
    worse = submit(worker, "worse", [1] * 40, max_tokens=20, priority=1)
    worker.step()
    late = submit(worker, "late", [2] * 20, max_tokens=30, priority=1)
    worker.step()
    assert (equal.state, worse.state, late.state) == ("decode", "decode", "waiting")
    wide = submit(worker, "wide", [3] * 300, max_tokens=1)  # what the worse one holds would not be enough for it
    worker.step()
    assert (equal.state, worse.state, wide.state) == ("decode", "decode", "waiting")
    worker.run()
    assert worker.scheduler.counters["preemptions"] == 0
    assert_undisturbed(worker, equal, worse, late, wide)


def test_a_better_priority_is_taken_in_from_a_prefill_worker_too() -> None:
    worker = ScheduledWorker.of(8, max_sequences=2)
    worse = [sequence_of(name, [number] * 100, 30, priority=1) for number, name in enumerate("ab")]
    for sequence in worse:
        assert worker.scheduler.reserve(sequence)
        worker.receive(sequence)
    assert not worker.scheduler.reserve(sequence_of("equal", [7] * 100, 30, priority=1))
    better = sequence_of("better", [8] * 100, 30)
    assert worker.scheduler.reserve(better)
    assert [sequence.state for sequence in (*worse, better)] == ["decode", "waiting", "receiving"]
    assert not worker.scheduler.reserve(sequence_of("late", [7], 30, priority=1))  # a replay comes before newcomers
    worker.receive(better)
    worker.run()
    assert_undisturbed(worker, *worse, better)


def test_the_share_of_prompts_follows_who_waits() -> None:
    worker = ScheduledWorker.of(400, max_sequences=16, max_batch_tokens=2048, is_drafting=False, max_waiting=40)
    submit(worker, "first", [7], max_tokens=100)
    worker.step()

    def prompt_rows() -> int:
        return sum(chunk.num for chunk in worker.step() if not chunk.absorbed)

    for number in range(7):
        submit(worker, f"s{number}", [number] * 200, max_tokens=100)
    assert prompt_rows() == 2048 // 4  # seven wait and one decodes: a quarter of the rows is the most they get
    assert prompt_rows() == 2048 // 4  # five wait, three decode
    assert prompt_rows() == 376  # all that is left
    for number in range(8):
        submit(worker, f"late {number}", [number, 9] * 200, max_tokens=100)
    shares = [prompt_rows() for _ in range(8)]
    assert shares == [512, 512, 512, 512, 2048 * 3 // 16, 256, 256, 256]  # an eighth at least


def test_who_floods_the_worker_waits_for_himself() -> None:
    worker = ScheduledWorker.of(40, max_sequences=1, max_waiting=100)
    for number in range(50):
        submit(worker, f"flood {number}", [1] * 10, max_tokens=4, caller="flood")
    worker.step()
    submit(worker, "polite", [2] * 10, max_tokens=4, caller="polite")
    worker.run()
    assert worker.finished.index("polite") == 2  # behind the one that ran, and the one whose turn it was


def test_rows_on_their_way_from_another_worker_are_not_taken_away() -> None:
    worker = ScheduledWorker.of(4)
    arriving = sequence_of("arriving", LONG[:100])
    assert worker.scheduler.reserve(arriving)
    growing = submit(worker, "growing", [5] * 100, max_tokens=60)
    for _ in range(60):
        worker.step()
    assert growing.state == "waiting"  # it gave way itself
    assert not worker.scheduler.reserve(sequence_of("newcomer", [1]))  # a replay comes before newcomers
    worker.receive(arriving)
    worker.run()
    assert worker.finished == ["arriving", "growing"]
    assert_undisturbed(worker, arriving, growing)


def test_a_prompt_that_did_not_come_whole_is_computed_here_and_shares_nothing_of_it() -> None:
    worker = ScheduledWorker.of(20, max_batch_tokens=400)
    struck, other = sequence_of("struck", LONG[:150]), sequence_of("other", LONG[:150])
    assert worker.scheduler.reserve(struck)
    worker.receive(struck, is_whole=False)
    assert not worker.scheduler.reserve(other)  # a replay comes before newcomers
    worker.step()
    assert worker.scheduler.reserve(other)
    assert (struck.state, other.cached_tokens) == ("decode", 128)
    worker.receive(other)
    worker.run()
    assert worker.scheduler.counters["preemptions"] == 0
    assert_undisturbed(worker, struck, other)


def test_a_reserved_prompt_says_what_of_it_is_here_and_is_published() -> None:
    worker = ScheduledWorker.of(9)
    first, second, third = (sequence_of(name, LONG[:128]) for name in ("first", "second", "third"))
    assert worker.scheduler.reserve(first)
    assert worker.scheduler.reserve(second)
    worker.receive(first)
    assert worker.scheduler.reserve(third)
    assert [sequence.cached_tokens for sequence in (first, second, third)] == [0, 0, 128]
    assert third.block_table[:2] == first.block_table[:2]
    worker.receive(second)
    worker.receive(third)
    worker.run()
    assert_undisturbed(worker, first, second, third)


def test_scored_prompts_are_computed_whole() -> None:
    worker = ScheduledWorker.of(20)
    submit(worker, "first", LONG[:200])
    worker.run()
    scored = sequence_of("scored", LONG[:200])
    scored.params = type(scored.params)(8, prompt_logprobs=0)
    worker.scheduler.submit(scored)
    worker.run()
    assert scored.cached_tokens == 0
    assert_undisturbed(worker, scored)


@pytest.mark.parametrize(("max_batch_tokens", "alone", "beside"), [(2048, 2048, 256), (512, 512, 64), (48, 48, 36)])
def test_prompts_get_a_share_while_others_decode(max_batch_tokens: int, alone: int, beside: int) -> None:
    worker = ScheduledWorker.of(200, max_sequences=4, max_batch_tokens=max_batch_tokens)
    prompt = LONG * 3
    first = submit(worker, "first", prompt, max_tokens=1)
    assert [chunk.num for chunk in worker.step()] == [alone]
    worker.scheduler.finish(first)
    for name in "abcd":
        submit(worker, name, [7], max_tokens=100)
    worker.step()
    submit(worker, "third", [1, *prompt], max_tokens=1, target="elsewhere")
    assert [chunk.num for chunk in worker.step()] == [1, 1, 1, 1, beside]  # and two drafts of each


# how many tokens that others begin with too (and which), how many of its own, and how many it asks for
PROMPTS = st.tuples(
    st.sampled_from([1, 64, 65, 128, 200, 300]), st.integers(0, 1), st.sampled_from([0, 1, 70]), st.integers(1, 150)
)


class SmallWorker(RuleBasedStateMachine):
    """Anything in any order on a cache that is too small; prompts with common beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = ScheduledWorker.of(8, max_sequences=3, max_batch_tokens=80, max_waiting=5)
        self.scheduler = self.worker.scheduler
        self.wanted: dict[str, tuple[list[int], int]] = {}
        self.number = 0

    def _new(self, drawn: tuple[int, int, int, int], **more: Any) -> Sequence:
        length, root, own, max_tokens = drawn
        self.number += 1
        prompt = [root] * length + [100 + self.number] * own
        made: Sequence = sequence_of(f"s{self.number}", prompt, max_tokens, **more)
        return made

    def _want(self, sequence: Sequence, taken: bool) -> None:
        if taken:
            num_tokens = 1 if sequence.target else sequence.params.max_tokens
            self.wanted[sequence.id] = (list(sequence.tokens), num_tokens)

    @rule(
        prompt=PROMPTS, priority=st.integers(-1, 1), caller=st.sampled_from("ab"), bound_to=st.sampled_from(["", "d"])
    )
    def submit(self, prompt: tuple[int, int, int, int], priority: int, caller: str, bound_to: str) -> None:
        sequence = self._new(prompt, priority=priority, caller=caller, target=bound_to)
        self._want(sequence, self.scheduler.submit(sequence))

    @rule(prompt=PROMPTS, priority=st.integers(-1, 1))
    def reserve(self, prompt: tuple[int, int, int, int], priority: int) -> None:
        # who wants one token only is never handed over
        sequence = self._new((*prompt[:3], prompt[3] + 1), priority=priority)
        self._want(sequence, self.scheduler.reserve(sequence))

    @precondition(lambda self: self.scheduler.receiving)
    @rule(is_whole=st.sampled_from([True, True, False]))
    def receive(self, is_whole: bool) -> None:
        self.worker.receive(self.scheduler.receiving[0], is_whole)

    @precondition(lambda self: self.scheduler.all())
    @rule(number=st.integers(0, 20))
    def drop(self, number: int) -> None:
        everyone = self.scheduler.all()
        dropped = everyone[number % len(everyone)]
        self.scheduler.finish(dropped)
        del self.wanted[dropped.id]

    @rule(is_drafting=st.booleans())
    def draft(self, is_drafting: bool) -> None:
        self.worker.is_drafting = is_drafting

    @rule(count=st.integers(1, 40))
    def steps(self, count: int) -> None:
        for _ in range(count):
            ahead = [*self.scheduler.decoding, *[s for s in self.scheduler.prefilling if not s.target]]
            first = min(ahead, key=lambda s: (s.priority, s.order), default=None)
            head = self.scheduler.waiting.peek()
            self.worker.step()
            if (
                first is not None
                and (head is None or head.priority >= first.priority)
                and not self.scheduler.receiving
                and not any(s.target for s in self.scheduler.prefilling)
            ):
                assert first.state != "waiting", f"{first.id} should never have been preempted"

    @invariant()
    def adds_up(self) -> None:
        self.scheduler.check()
        assert len(self.scheduler.waiting) <= self.scheduler.max_waiting + self.scheduler.max_sequences

    def teardown(self) -> None:
        while self.scheduler.receiving:
            self.worker.receive(self.scheduler.receiving[0])
        self.worker.run()
        for name, (prompt, num_tokens) in self.wanted.items():
            assert self.worker.sent[name] == answer_to(prompt, num_tokens)
        assert self.scheduler.all() == []
        assert self.scheduler.allocator.num_free == self.scheduler.allocator.num_total


TestSmallWorker = SmallWorker.TestCase
TestSmallWorker.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
