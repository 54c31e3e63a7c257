"""The rows of a prompt on their way from a prefill worker `a` to a decode worker `b`: which, how many, and unharmed."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from scripted_engines import Front, NarrowPipe, Worker, answer_to, connect

from braid.actors.kv_transfer import runs
from braid.actors.messages import KV_LAYER, Kind
from braid.actors.pipe import Piece
from braid.actors.socket_pipe import SocketPipe
from braid.model.sampling_params import SamplingParams

ONE, TEN = SamplingParams(max_tokens=1, temperature=0.0), SamplingParams(max_tokens=10, temperature=0.0)
NUM_LAYERS, ROW_BYTES = 2, 6 * 4


class Pair:
    """Prefill worker `a`, decode worker `b` and their front end."""

    def __init__(self) -> None:
        self.front = Front()
        self.a, self.b = Worker("a", blocks=16), Worker("b", blocks=16)
        connect(self.a, self.front)
        connect(self.b, self.front)
        self.to_b, _ = connect(self.a, self.b)
        for side in (self.a, self.b, self.front):
            side.listen()

    def run(self) -> None:
        for _ in range(200):
            busy = [self.a.turn(), self.b.turn()]
            self.front.listen()
            if not any(busy):
                busy = [self.a.turn(), self.b.turn()]
                if not any(busy):
                    return
        raise AssertionError("the workers never came to rest")

    def ask(self, num_prompt: int, prefill: str = "a") -> int:
        """The bytes of KV rows that crossed; the answer is checked."""
        before = self.a.requests.counters["kv_bytes_out"]
        name = self.front.submit(prefill, "b", num_prompt, TEN)
        self.run()
        tokens = self.front.heard[name].tokens
        assert [tokens[index] for index in range(len(tokens))] == answer_to(num_prompt, TEN)
        crossed: int = self.a.requests.counters["kv_bytes_out"] - before
        return crossed


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    try:
        yield made
        made.a.assert_empty()
        made.b.assert_empty()
    finally:
        for side in (made.a, made.b, made.front):
            side.reactor.close()


def test_runs_cover_the_positions_in_order_and_join_neighbours() -> None:
    rng = random.Random(3)
    for _ in range(300):
        table = rng.sample(range(12), 6)
        start = rng.randrange(6 * 64)
        num = rng.randrange(6 * 64 - start + 1)
        found = runs(table, start, num)
        rows = [row + offset for row, count in found for offset in range(count)]
        assert rows == [table[position // 64] * 64 + position % 64 for position in range(start, start + num)]
        assert all(one + count != other for (one, count), (other, _) in pairwise(found))


def test_a_prefix_that_both_hold_does_not_travel_again(pair: Pair) -> None:
    assert pair.ask(200) == 200 * NUM_LAYERS * ROW_BYTES
    assert pair.ask(250) == (250 - 192) * NUM_LAYERS * ROW_BYTES
    # b holds every row of it; what a computes for the first token leaves until b has said so: one step's rows
    assert pair.ask(192) <= 48 * NUM_LAYERS * ROW_BYTES
    assert pair.b.requests.counters["kv_bytes_in"] == pair.a.requests.counters["kv_bytes_out"]


def test_a_prefix_that_only_the_prefill_worker_holds_is_sent_with_the_rest(pair: Pair) -> None:
    first = pair.front.submit("a", "a", 130, TEN)
    pair.run()
    assert len(pair.front.heard[first].tokens) == 10
    assert pair.ask(200) == 200 * NUM_LAYERS * ROW_BYTES
    assert pair.a.scheduler.counters["prefix_hit_tokens"] == 128


def test_a_prefix_that_only_the_decode_worker_holds_is_computed_and_dropped(pair: Pair) -> None:
    first = pair.front.submit("b", "b", 130, TEN)
    pair.run()
    assert len(pair.front.heard[first].tokens) == 10
    assert pair.ask(200) <= 200 * NUM_LAYERS * ROW_BYTES
    assert pair.b.requests.counters["kv_bytes_in"] <= 200 * NUM_LAYERS * ROW_BYTES


def test_the_cached_prefix_follows_when_the_decode_worker_accepts_late(pair: Pair) -> None:
    pair.front.submit("a", "a", 130, TEN)
    pair.run()
    name = pair.front.submit("a", "b", 140, TEN)
    pair.a.turn()  # the whole prompt is computed before b has said a word
    assert pair.a.requests.counters["kv_bytes_out"] == 0
    pair.run()
    assert len(pair.front.heard[name].tokens) == 10
    assert pair.a.requests.counters["kv_bytes_out"] == 140 * NUM_LAYERS * ROW_BYTES


def test_decoding_begins_in_the_turn_that_hears_of_the_last_layer(pair: Pair) -> None:
    name = pair.front.submit("a", "b", 40, TEN)
    pair.a.turn()
    pair.b.listen()
    pair.a.turn()
    pair.b.turn()
    pair.front.listen()
    assert sorted(pair.front.heard[name].tokens) == [0, 1]
    pair.run()


def test_a_first_token_does_not_wait_for_a_pass_that_begins_when_the_decode_worker_has_accepted(pair: Pair) -> None:
    name = pair.front.submit("a", "b", 40, TEN)
    pair.a.turn()
    pair.b.listen()
    pair.front.submit("a", "a", 30, TEN)
    forward, heard = pair.a.model.forward, []

    def looked(*args: Any, **more: Any) -> Any:
        pair.front.listen()
        heard.append(dict(pair.front.heard[name].tokens))
        return forward(*args, **more)

    pair.a.model.forward = looked
    pair.a.turn()
    assert heard == [{0: answer_to(40, TEN)[0]}]
    pair.run()


class Harmful(SocketPipe):
    """Changes one byte of the first 30 rows it is given."""

    harmed = 0

    def write(self, pieces: Sequence[Piece]) -> int:
        sent = [bytes(piece) for piece in pieces]
        for place, piece in enumerate(sent):
            if len(piece) == 30 * ROW_BYTES and not self.harmed:
                sent[place] = piece[:100] + bytes([piece[100] ^ 16]) + piece[101:]
                self.harmed += 1
        return super().write(sent)


class Repeating(SocketPipe):
    """Sends the first layer's 30 rows again in place of the second's."""

    harmed = 0
    first: Sequence[Piece] = ()

    def write(self, pieces: Sequence[Piece]) -> int:
        if len(pieces[-1]) != 30 * ROW_BYTES:
            return super().write(pieces)
        if self.first:
            self.harmed += 1
        self.first = self.first or [bytes(piece) for piece in pieces]
        return super().write(self.first)


@pytest.mark.parametrize(("kind", "num_damaged"), [(Harmful, 1), (Repeating, 0)])
def test_what_does_not_come_as_it_was_sent_is_computed_again(
    pair: Pair, kind: type[Harmful | Repeating], num_damaged: int
) -> None:
    to_b, _ = connect(pair.a, pair.b, kind)
    pair.a.listen()
    pair.b.listen()
    struck, spared = (pair.front.submit("a", "b", num, TEN) for num in (30, 40))
    pair.run()
    pipe = to_b._pipe
    assert isinstance(pipe, kind)
    assert pipe.harmed == 1
    assert pair.b.requests.counters["kv_damaged"] == num_damaged
    assert pair.b.requests.counters["failed"] == pair.a.requests.counters["failed"] == 0
    for name, num_prompt in ((struck, 30), (spared, 40)):
        heard = pair.front.heard[name]
        assert [heard.tokens[index] for index in range(len(heard.tokens))] == answer_to(num_prompt, TEN)
        assert (heard.finishes, heard.errors) == (["length"], [])


def test_a_sequence_that_is_computed_again_hangs_on_its_prefill_worker_no_more(pair: Pair) -> None:
    to_b, _ = connect(pair.a, pair.b, Harmful)
    pair.a.listen()
    pair.b.listen()
    name = pair.front.submit("a", "b", 30, TEN)
    while pair.a.requests.counters["kv_bytes_out"] == 0:
        pair.a.turn()
        pair.b.listen()
    pair.b.listen()
    [sequence] = pair.b.scheduler.waiting
    assert (sequence.num_generated, sequence.block_table) == (1, [])
    to_b.close("cut")
    pair.run()
    heard = pair.front.heard[name]
    assert [heard.tokens[index] for index in range(len(heard.tokens))] == answer_to(30, TEN)


@pytest.mark.parametrize(
    ("layer", "start", "num", "num_bytes"),
    [(2, 0, 1, ROW_BYTES), (0, 39, 2, 2 * ROW_BYTES), (0, 1 << 31, 1, ROW_BYTES), (0, 0, 2, ROW_BYTES)],
)
def test_rows_that_a_prompt_does_not_have_cost_their_sender_the_link(
    pair: Pair, layer: int, start: int, num: int, num_bytes: int
) -> None:
    name = pair.front.submit("a", "b", 40, TEN)
    pair.a.listen()
    pair.b.listen()
    payload = bytes(num_bytes)
    meta = KV_LAYER.pack(layer, pair.b.scheduler.receiving[0].number, start, num, zlib.crc32(payload))
    pair.to_b.send(Kind.KV_LAYER, meta, payload)
    pair.b.listen()
    pair.run()
    assert pair.to_b.closed
    assert pair.front.heard[name].finishes[0] == "error"


class NarrowPair(Pair):
    """The link between the workers has room for little at a time, and may queue little: rows go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.to_b, _ = connect(self.a, self.b, NarrowPipe, max_queued_bytes=4000)
        self.most_queued = 0
        for side in (self.a, self.b):
            side.listen()
        self.front.submit("a", "a", 300, ONE)  # its prefix of 256 positions is in the cache of `a` from now on
        while self.a.turn():
            pass

    def begin(self, num_prompt: int) -> str:
        """The prompt is computed, and its prefix on its way."""
        name: str = self.front.submit("a", "b", num_prompt, TEN)
        self.a.listen()
        self.b.listen()
        self.turn()
        [sequence] = self.a.scheduler.prefilling
        assert sequence.state == "handover"
        assert sequence.accepted
        return name

    def turn(self) -> bool:
        busy = self.a.turn()
        self.most_queued = max(self.most_queued, self.to_b.queued_bytes)
        return any([busy, self.b.turn()])

    def run(self) -> None:
        for _ in range(400):
            busy = self.turn()
            self.front.listen()
            if not busy and not self.turn():
                self.front.listen()
                return
        raise AssertionError("the workers never came to rest")


@pytest.fixture
def narrow() -> Iterator[NarrowPair]:
    made = NarrowPair()
    try:
        yield made
        made.run()
        made.a.assert_empty()
        made.b.assert_empty()
        assert made.most_queued <= 4000
    finally:
        for side in (made.a, made.b, made.front):
            side.reactor.close()


def test_a_long_prefix_flows_as_the_link_has_room(narrow: NarrowPair) -> None:
    assert narrow.ask(300) == 300 * NUM_LAYERS * ROW_BYTES
    assert narrow.b.requests.counters["kv_bytes_in"] == 300 * NUM_LAYERS * ROW_BYTES
    assert narrow.most_queued > 1000


def test_new_rows_wait_too_where_a_link_is_behind(narrow: NarrowPair) -> None:
    assert narrow.ask(500) == 500 * NUM_LAYERS * ROW_BYTES


def test_others_go_on_while_rows_wait(narrow: NarrowPair) -> None:
    slow = narrow.begin(300)
    here, there = narrow.front.submit("a", "a", 20, TEN), narrow.front.submit("a", "b", 21, TEN)
    while not narrow.front.heard[here].finishes or not narrow.front.heard[there].finishes:
        assert not narrow.front.heard[slow].tokens
        narrow.turn()
        narrow.front.listen()
    narrow.run()
    heard = narrow.front.heard[slow]
    assert [heard.tokens[index] for index in range(len(heard.tokens))] == answer_to(300, TEN)


def test_the_first_token_waits_for_the_last_row(narrow: NarrowPair) -> None:
    name = narrow.begin(300)
    while narrow.a.requests.handovers.sender._waiting:
        narrow.front.listen()
        assert not narrow.front.heard[name].tokens
        narrow.turn()


@pytest.mark.parametrize("end", ["cancel", "deadline", "death"])
def test_whatever_ends_a_sequence_whose_rows_wait_frees_its_blocks(narrow: NarrowPair, end: str) -> None:
    name = narrow.begin(300)
    [sequence] = narrow.a.scheduler.prefilling
    if end == "cancel":
        narrow.front.cancel(name)
    elif end == "deadline":
        sequence.deadline = 0.0
    else:
        narrow.to_b.close("cut")
    narrow.a.turn()
    narrow.a.assert_empty()
    narrow.run()
    narrow.b.assert_empty()
    assert narrow.front.heard[name].finishes[:1] == {"cancel": []}.get(end, ["error"])


def test_time_and_bytes_of_a_transfer_come_with_the_first_token(pair: Pair) -> None:
    heard: list[dict[str, float]] = []
    pair.front._hear = lambda _, item: heard.append(item.get("timing", {}))
    pair.front.submit("a", "b", 100, TEN)
    pair.run()
    [timing] = [timing for timing in heard if "kv_s" in timing]
    assert timing["kv_bytes"] == 100 * NUM_LAYERS * ROW_BYTES
    assert 0 < timing["kv_send_s"] <= timing["kv_s"]
