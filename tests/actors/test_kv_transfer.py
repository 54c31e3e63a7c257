"""The rows of a prompt on their way from a prefill worker `a` to a decode worker `b`: which, how many, and unharmed."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from scripted_engines import Front, Worker, answer_to, connect

from braid.actors.kv_transfer import runs
from braid.actors.links import Link
from braid.actors.pipe import Piece
from braid.actors.socket_pipe import SocketPipe
from braid.model.sampling_params import SamplingParams

TEN = SamplingParams(max_tokens=10, temperature=0.0)
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


def test_rows_that_are_damaged_on_the_way_end_their_request_by_name_and_no_other(pair: Pair) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pipe = Harmful(left, "unix")
    pair.a.reactor.add(Link(pair.b.hello, pipe))
    pair.b.reactor.add(Link(pair.a.hello, SocketPipe(right, "unix")))
    pair.a.listen()
    pair.b.listen()
    struck, spared = (pair.front.submit("a", "b", num, TEN) for num in (30, 40))
    pair.run()
    assert pipe.harmed == 1
    [error] = pair.front.heard[struck].errors
    assert error["code"] == "unavailable"
    assert error["message"].startswith("layer 0 of positions 0 to 29 of its KV cache arrived damaged from a")
    assert pair.b.requests.counters["kv_damaged"] == 1
    assert pair.front.heard[spared].finishes == ["length"]


def test_rows_that_no_queue_could_take_end_their_request_and_no_other(pair: Pair) -> None:
    pair.a.listen()
    pair.b.listen()
    (link,) = [link for link in pair.a.reactor.links() if link.peer.name == "b"]
    struck, spared = pair.front.submit("a", "b", 45, TEN), pair.front.submit("a", "a", 40, TEN)
    pair.a.listen()
    link.max_queued_bytes = 45 * ROW_BYTES - 1
    pair.run()
    [error] = pair.front.heard[struck].errors
    assert error["message"] == "0 of 90 latent rows arrived from a"
    assert pair.front.heard[spared].finishes == ["length"]


def test_time_and_bytes_of_a_transfer_come_with_the_first_token(pair: Pair) -> None:
    heard: list[dict[str, float]] = []
    pair.front._hear = lambda _, item: heard.append(item.get("timing", {}))
    pair.front.submit("a", "b", 100, TEN)
    pair.run()
    [timing] = [timing for timing in heard if "kv_s" in timing]
    assert timing["kv_bytes"] == 100 * NUM_LAYERS * ROW_BYTES
    assert 0 < timing["kv_send_s"] <= timing["kv_s"]
