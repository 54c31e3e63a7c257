"""Requests between two attention workers and a front end: in whatever order they hear, each is answered and freed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engines import VOCAB, Front, NarrowPipe, Worker, answer_to, connect

from braid.actors.links import Link
from braid.actors.messages import KV_LAYER, Kind, pack
from braid.actors.tracing import Attributes, Tracer
from braid.model.sampling_params import SamplingParams

TEN = SamplingParams(max_tokens=10, temperature=0.0)


class Trio:
    """Workers `a` and `b`, linked with each other and with one front end. The experts of `b` are elsewhere.

    `is_narrow`: between the workers rows have room for few at a time.
    """

    def __init__(self, is_narrow: bool = False, **limits: int) -> None:
        self.is_narrow, self.limits = is_narrow, limits
        self.front = Front()
        self.workers = {name: Worker(name, has_waits=name == "b", **limits) for name in "ab"}
        self.ends: dict[str, tuple[Link, Link]] = {}
        for pair in ("ab", "af", "bf"):
            self.connect(pair)
        for side in (*self.workers.values(), self.front):
            side.listen()

    def connect(self, pair: str) -> None:
        narrow = (NarrowPipe, 8000) if self.is_narrow and pair == "ab" else ()
        self.ends[pair] = connect(self.member(pair[0]), self.member(pair[1]), *narrow)

    def member(self, name: str) -> Worker | Front:
        return self.front if name == "f" else self.workers[name]

    def cut(self, pair: str) -> None:
        self.ends[pair][0].close("cut")

    def restart(self, name: str) -> None:
        """The worker dies and a new life of it is linked with the others at once."""
        pairs = [pair for pair in self.ends if name in pair]
        for pair in pairs:
            self.cut(pair)
        old = self.workers[name]
        old.close()
        self.workers[name] = Worker(name, old.hello.incarnation + 1, has_waits=name == "b", **self.limits)
        for pair in pairs:
            self.connect(pair)

    def run(self, rounds: int = 60) -> None:
        """Until nobody has anything to do."""
        quiet = 0
        for _ in range(rounds * 10):
            busy = [worker.turn() for worker in self.workers.values()]
            self.front.listen()
            quiet = 0 if any(busy) else quiet + 1
            if quiet > 4:
                return
        raise AssertionError("the workers never came to rest")

    def check(self) -> None:
        for worker in self.workers.values():
            worker.assert_empty()
        for heard in self.front.heard.values():
            heard.check()

    def close(self) -> None:
        for side in (*self.workers.values(), self.front):
            side.reactor.close()


@pytest.fixture
def trio() -> Iterator[Trio]:
    made = Trio()
    try:
        yield made
        made.run()
        made.check()
    finally:
        made.close()


@pytest.mark.parametrize("decode", ["a", "b"])
@pytest.mark.parametrize("num_prompt", [1, 63, 64, 65, 130])
def test_an_answer_is_the_same_with_and_without_a_handover(trio: Trio, decode: str, num_prompt: int) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.0, prompt_logprobs=1)
    name = trio.front.submit("a", decode, num_prompt, params)
    trio.run()
    heard = trio.front.heard[name]
    assert [heard.tokens[index] for index in range(len(heard.tokens))] == answer_to(num_prompt, params)
    assert heard.prompt_logprobs == num_prompt


class Notes(Tracer):
    """Keeps when each phase ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, int] = {}

    def record(
        self,
        name: str,
        carrier: Mapping[str, str],
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        error: str | None = None,
    ) -> None:
        self.ends[name] = end_ns


def test_a_transfer_ends_before_what_follows_it_however_fast_that_is(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, notes = trio.workers["a"], trio.workers["b"], Notes()
    a.requests.tracer = b.requests.tracer = notes
    send = a.requests.peers.send

    def send_and_be_slow(link: Link, kind: Kind, meta: bytes) -> bool:
        has_left: bool = send(link, kind, meta)
        while kind is Kind.KV_DONE and "decode" not in notes.ends:
            b.turn()
        return has_left

    monkeypatch.setattr(a.requests.peers, "send", send_and_be_slow)
    trio.front.submit("a", "b", 65, TEN)
    trio.run()
    assert notes.ends["kv_transfer"] <= notes.ends["decode"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_needs_no_decode_worker_does_not_hang_on_one(trio: Trio, max_tokens: int) -> None:
    name = trio.front.submit("a", "b", 100, SamplingParams(max_tokens, temperature=0.0, prompt_logprobs=0))
    trio.workers["a"].turn()
    trio.cut("ab")
    trio.run()
    heard = trio.front.heard[name]
    assert (heard.finishes, len(heard.tokens), heard.errors) == (["length"], max_tokens, [])


def test_a_prefill_worker_that_is_back_at_once_does_not_keep_its_old_reservations(trio: Trio) -> None:
    lost = trio.front.submit("a", "b", 100, TEN)
    trio.workers["a"].turn()
    trio.workers["b"].listen()
    trio.restart("a")
    trio.workers["b"].turn()
    trio.front.listen()
    assert [error["code"] for error in trio.front.heard[lost].errors] == ["unavailable"]
    trio.front.submit("a", "b", 100, TEN)  # its number is the old life's


def test_a_decode_worker_that_is_back_at_once_is_not_taken_for_its_old_life(trio: Trio) -> None:
    lost = trio.front.submit("a", "b", 100, TEN)
    trio.workers["a"].turn()
    trio.workers["b"].listen()
    trio.restart("b")
    trio.front.heard[lost].is_excused = False
    trio.run()
    assert trio.front.heard[lost].finishes == ["error"]


def test_a_front_end_that_reconnects_has_given_up_what_it_asked_before(trio: Trio) -> None:
    trio.front.submit("a", "a", 10, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    trio.workers["a"].turn()
    trio.cut("af")
    trio.connect("af")
    trio.workers["a"].listen()
    trio.workers["a"].assert_empty()


def test_a_second_link_of_a_peer_ends_what_hung_on_its_first(trio: Trio) -> None:
    name = trio.front.submit("a", "b", 100, TEN)
    trio.workers["a"].turn()
    trio.workers["b"].listen()
    first = trio.ends["ab"][1]
    trio.connect("ab")  # `a` believes the first one dead, `b` has not heard of it
    trio.workers["b"].listen()
    trio.workers["b"].assert_idle()
    assert first.closed
    trio.run()
    assert trio.front.heard[name].finishes[0] == "error"


def test_who_says_busy_is_named(trio: Trio) -> None:
    there = [trio.front.submit("a", "b", 10, TEN) for _ in range(5)]
    trio.workers["a"].listen()
    trio.workers["b"].listen()  # it has places for four
    here = [trio.front.submit("a", "a", 10, TEN) for _ in range(4)]
    trio.run()
    told = [[(error["code"], error["by"]) for error in trio.front.heard[name].errors] for name in there + here]
    assert told == [[]] * 4 + [[("busy", "b")]] + [[]] * 3 + [[("busy", "a")]]  # whose queue holds eight


def test_a_cancel_may_overtake_what_it_cancels(trio: Trio) -> None:
    name = trio.front.submit("a", "b", 100, TEN)
    trio.front.cancel(name)
    trio.workers["b"].listen()  # CANCEL comes before KV_OPEN
    trio.workers["a"].turn()
    trio.run()
    assert trio.front.heard[name].finishes == []


def test_a_step_that_raises_ends_its_sequences_and_leaves_nothing_for_the_next(trio: Trio) -> None:
    lost = trio.front.submit("a", "a", 20, TEN)
    worker = trio.workers["a"]
    worker.experts.failed = {17: "no live replica of expert 3"}
    worker.model.defect = "one bad step"
    worker.turn()
    worker.model.defect = None
    whole = trio.front.submit("a", "a", 2, TEN)
    trio.run()
    assert [error["code"] for error in trio.front.heard[lost].errors] == ["internal"]
    assert trio.front.heard[whole].finishes == ["length"]


def test_a_step_that_raises_spares_who_had_no_part_in_it(trio: Trio) -> None:
    arriving = trio.front.submit("a", "b", 10, TEN)
    trio.workers["a"].listen()
    worker = trio.workers["b"]
    worker.listen()
    struck = trio.front.submit("b", "b", 40, TEN)
    waiting = trio.front.submit("b", "b", 8 * 64 - 10, TEN)  # needs every block
    worker.model.defect = "one bad step"
    worker.turn()
    worker.model.defect = None
    trio.run()
    assert [error["code"] for error in trio.front.heard[struck].errors] == ["internal"]
    assert [trio.front.heard[name].finishes for name in (arriving, waiting)] == [["length"], ["length"]]


def test_rows_that_lost_an_expert_end_their_own_sequence_only(trio: Trio) -> None:
    worker = trio.workers["a"]
    first = trio.front.submit("a", "a", 5, SamplingParams(9, temperature=0.0, prompt_logprobs=0, ignore_eos=True))
    worker.turn()
    struck = trio.front.submit("a", "a", 7, SamplingParams(9, temperature=0.0, prompt_logprobs=0, ignore_eos=True))
    last = trio.front.submit("a", "a", 9, SamplingParams(9, temperature=0.0, ignore_eos=True))
    worker.experts.failed = {1 + 6: "no live replica of expert 3"}  # row 0 decodes `first`
    trio.run()
    assert [error["code"] for error in trio.front.heard[struck].errors] == ["unavailable"]
    assert [trio.front.heard[name].finishes for name in (first, last)] == [["length"], ["length"]]


def test_a_sequence_that_cannot_be_sampled_ends_alone(trio: Trio) -> None:
    everything = tuple(range(VOCAB))
    spared = trio.front.submit("a", "b", 5, TEN)
    strange = trio.front.submit("a", "b", 6, SamplingParams(9, min_tokens=2, stop_token_ids=everything))
    last = trio.front.submit("a", "b", 7, TEN)
    trio.run()
    [error] = trio.front.heard[strange].errors
    assert error["code"] == "invalid"
    assert "min_tokens is 2, but stop_token_ids and end tokens leave no other token" in error["message"]
    assert [trio.front.heard[name].finishes for name in (spared, last)] == [["length"], ["length"]]


def test_a_message_that_cannot_be_read_costs_its_sender_the_link_and_nobody_else(trio: Trio) -> None:
    spared = trio.front.submit("b", "b", 10, TEN)
    trio.workers["b"].turn()
    garbage = [(Kind.KV_OPEN, b"\xc1"), (Kind.KV_DONE, pack({})), (Kind.KV_LAYER, KV_LAYER.pack(9, 1, 0, 1, 0))]
    for kind, meta in garbage:
        trio.ends["ab"][0].send(kind, meta)
        trio.workers["b"].listen()
        if kind is not Kind.KV_LAYER:  # rows of a request that is not known are dropped unread
            assert trio.ends["ab"][1].closed
            trio.connect("ab")
            trio.workers["b"].listen()
    trio.run()
    assert trio.front.heard[spared].finishes == ["length"]


@pytest.mark.parametrize("prefill", ["a", "b"])
def test_who_is_preempted_comes_back_and_repeats_nothing(trio: Trio, prefill: str) -> None:
    endless = SamplingParams(200, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    names = [trio.front.submit(prefill, "b", 100 + number, endless) for number in range(3)]  # 5 of 8 blocks each
    trio.run()
    for number, name in enumerate(names):
        heard = trio.front.heard[name]
        assert (heard.finishes, heard.prompt_logprobs, len(heard.tokens)) == (["length"], 100 + number, 200)
    assert trio.workers["b"].scheduler.counters["preemptions"] > 0


def test_what_cannot_be_computed_is_refused_by_name(trio: Trio) -> None:
    empty = trio.front.submit("a", "a", 0, TEN)
    spared = trio.front.submit("a", "a", 3, TEN)
    trio.run()
    assert [error["code"] for error in trio.front.heard[empty].errors] == ["invalid"]
    assert trio.front.heard[spared].finishes


def test_a_front_end_that_does_not_read_loses_its_link(trio: Trio) -> None:
    worker, link = trio.workers["a"], trio.ends["af"][0]
    link.max_queued_bytes = 10_000
    trio.front.submit("a", "a", 3, SamplingParams(400, temperature=0.0, ignore_eos=True))
    worker.turn()
    while not link.queued_bytes:  # however much the socket's buffer takes
        link.send(Kind.LOAD, bytes(5000))
    while not link.closed:
        assert worker.turn(), "tokens were lost and nobody noticed"
        if not link.closed and link.queued_bytes < 4_000:
            link.send(Kind.LOAD, bytes(5000))
    worker.listen()
    worker.assert_empty()


SUBMIT = st.tuples(
    st.just("submit"),
    st.sampled_from(["aa", "ab", "ab", "ba", "bb"]),
    st.integers(1, 200),
    st.one_of(st.integers(0, 12), st.just(100)),
    st.sampled_from([False] * 9 + [True]),
)
PAIRS = st.sampled_from(["ab", "af", "bf"])
OPERATIONS = st.one_of(
    SUBMIT,
    SUBMIT,
    SUBMIT,
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    *[st.tuples(st.just("turn"), st.sampled_from("ab"))] * 4,
    *[st.tuples(st.just("listen"), st.sampled_from("abf"))] * 2,
    st.tuples(st.just("cut"), PAIRS),
    st.tuples(st.just("connect"), PAIRS),
    st.tuples(st.just("restart"), st.sampled_from("ab")),
    st.tuples(st.just("defect"), st.sampled_from("ab")),
    st.tuples(st.just("lost rows"), st.sampled_from("ab"), st.integers(0, 3)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(OPERATIONS, min_size=12, max_size=30), st.booleans())
def test_whatever_happens_every_request_is_answered_and_every_block_comes_back(
    operations: list[tuple[str, ...]], is_narrow: bool
) -> None:
    trio = Trio(is_narrow, blocks=6, max_waiting=3)
    try:
        for operation in operations:
            play(trio, *operation)
        for pair in trio.ends:
            if trio.ends[pair][0].closed:
                trio.connect(pair)
        trio.run()
        trio.check()
    finally:
        trio.close()


def play(trio: Trio, what: str, *args: object) -> None:
    match what, args:
        case "submit", [str(where), int(num_prompt), int(max_tokens), bool(is_late)]:
            wanted = SamplingParams(max_tokens, temperature=0.0, prompt_logprobs=0 if max_tokens % 3 == 0 else None)
            trio.front.submit(where[0], where[1], num_prompt, wanted, deadline=0.0 if is_late else None)
        case "cancel", [int(number)] if number < len(trio.front.heard):
            trio.front.cancel(f"r{number}")
        case "turn", [str(name)]:
            trio.workers[name].turn()
        case "listen", ["f"]:
            trio.front.listen()
        case "listen", [str(name)]:
            trio.workers[name].listen()
        case "cut", [str(pair)]:
            trio.cut(pair)
        case "connect", [str(pair)] if trio.ends[pair][0].closed:
            trio.connect(pair)
        case "restart", [str(name)]:
            trio.restart(name)
        case "defect", [str(name)]:
            worker = trio.workers[name]
            worker.model.defect = "a bad step"
            worker.turn()
            worker.model.defect = None
        case "lost rows", [str(name), int(row)]:
            worker = trio.workers[name]
            if row < sum(1 for _ in worker.scheduler.decoding):
                worker.experts.failed[row] = "no live replica of expert 0"
