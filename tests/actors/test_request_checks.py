"""What one peer asks in vain costs nobody else anything: what cannot be served is answered, garbage ends its link."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engines import CONFIG, VOCAB, Front, Heard, Worker, connect

from braid.actors.links import Link
from braid.actors.messages import Kind, pack, unpack
from braid.actors.reactor import Received
from braid.model.sampling_params import SamplingParams

GOOD = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
NAN, INF = float("nan"), float("inf")


class Company:
    """Workers `a` and `b`, a front end that asks as it should and one, `rogue`, that does not."""

    def __init__(self) -> None:
        self.a, self.b = Worker("a"), Worker("b")
        self.front, self.rogue = Front("front-0"), Front("front-1")
        self.sides: list[Worker | Front] = [self.a, self.b, self.front, self.rogue]
        self.kv, _ = connect(self.a, self.b)
        for front in (self.front, self.rogue):
            connect(self.a, front)
            connect(self.b, front)
        self.turn()

    def peer(self, name: str, worker: Worker) -> Front:
        """Somebody else who is linked with a worker."""
        peer = Front(name)
        connect(worker, peer)
        peer.listen()
        self.turn()
        self.sides.append(peer)
        return peer

    def turn(self) -> bool:
        busy = [worker.turn() for worker in (self.a, self.b)]
        for front in (self.front, self.rogue):
            front.listen()
        return any(busy)

    def run(self) -> None:
        quiet = 0
        for _ in range(400):
            quiet = 0 if self.turn() else quiet + 1
            if quiet > 4:
                return
        raise AssertionError("the workers never came to rest")

    def ask(self, decode: str = "b") -> None:
        self.front.submit("a", decode, 70, GOOD)

    def send(self, kind: Kind, body: Any) -> Link:
        """To `a`, by the rogue."""
        link: Link = self.rogue.links["a"]
        link.send(kind, body if isinstance(body, bytes) else pack(body))
        return link

    def check(self) -> None:
        """Whoever asked well got all of it, and nothing is left."""
        self.run()
        for heard in self.front.heard.values():
            heard.check()
            assert heard.finishes == ["length"], heard
        for worker in (self.a, self.b):
            worker.assert_empty()


@pytest.fixture
def company() -> Iterator[Company]:
    made = Company()
    try:
        yield made
    finally:
        for side in made.sides:
            side.reactor.close()


def submission(**changes: Any) -> dict[str, Any]:
    """A sound SUBMIT to `a` but for the changes."""
    params = {**GOOD.to_wire(), **changes.pop("params", {})}
    body = {"id": "bad", "prompt": [5] * 9, "decode": "b", "params": params, "carrier": {}, "front": "front-1"}
    return {**body, "deadline": time.time() + 60, **changes}


UNFIT = [
    ({"prompt": [5] * 1000, "params": {"max_tokens": 26}}, "1000 tokens and max_tokens 26 take 1025 positions"),
    ({"prompt": [5] * 1025, "params": {"max_tokens": 0, "prompt_logprobs": 1}}, "take 1025 positions"),
    ({"params": {"max_tokens": 2**40}}, "and the model has 1024: shorten the prompt or lower max_tokens"),
    ({"params": {"max_tokens": -1}}, "max_tokens is -1"),
    ({"params": {"max_tokens": 3.5}}, "max_tokens is 3.5"),
    ({"params": {"temperature": NAN}}, "temperature is nan"),
    ({"params": {"temperature": "hot"}}, "temperature is 'hot'"),
    ({"params": {"top_p": 0.0}}, "top_p is 0.0"),
    ({"params": {"min_p": INF}}, "min_p is inf"),
    ({"params": {"top_k": -3}}, "top_k is -3"),
    ({"params": {"seed": 2**63}}, "seed is 9223372036854775808"),
    ({"params": {"stop_token_ids": [-1], "min_tokens": 1}}, "stop_token_ids is -1"),
    ({"params": {"stop_token_ids": ["x", 3], "min_tokens": 1}}, "stop_token_ids is 'x'"),
    ({"params": {"logprobs": VOCAB}}, f"logprobs is {VOCAB}"),
    ({"params": {"prompt_logprobs": -1}}, "prompt_logprobs is -1"),
    ({"params": {"min_tokens": 13}}, "min_tokens is 13"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": [5, VOCAB]}, f"token id {VOCAB}: use integers from 0 to {VOCAB - 1}"),
    ({"prompt": [5, 1.5]}, "token id 1.5"),
    ({"prompt": [5, "a"]}, "token id 'a'"),
    ({"prompt": "abc"}, "token id 'a'"),
    ({"prompt": [[5]]}, "token id [5]"),
]


@pytest.mark.parametrize(("changes", "reason"), UNFIT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_served_is_answered_with_the_figure_and_disturbs_nobody(
    company: Company, changes: dict[str, Any], reason: str
) -> None:
    company.ask()
    company.turn()
    company.rogue.heard["bad"] = Heard(9, GOOD, "a", "b")
    link = company.send(Kind.SUBMIT, submission(**changes))
    company.ask("a")
    company.run()
    (error,) = company.rogue.heard["bad"].errors
    assert error["code"] == "invalid"
    assert reason in error["message"]
    assert link.closed is None
    company.check()


def test_as_many_positions_as_the_model_has_are_served(company: Company) -> None:
    for worker in (company.a, company.b):
        assert worker.scheduler.allocator.num_total * 64 < CONFIG.max_position_embeddings, "else raise the sizes here"
    short = Worker("short", blocks=17)
    company.sides.append(short)
    connect(short, company.front)
    params = SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True)
    company.front.listen()
    name = company.front.submit("short", "short", 1000, params)
    for _ in range(80):
        short.turn()
        company.front.listen()
    assert company.front.heard[name].finishes == ["length"]
    company.front.heard[name].check()


BREACHES = [
    {"deadline": None},
    {"deadline": "soon"},
    {"deadline": NAN},
    {"deadline": INF},
    {"priority": "high"},
    {"caller": ["me"]},
    {"carrier": []},
    {"carrier": {"traceparent": 3}},
    {"id": 7},
    {"front": "front-0"},
    {"front": None},
    {"decode": ["b"]},
    {"params": {"colour": "red"}},
    {"prompt": 5},
    {"unheard_of": 1},
]


@pytest.mark.parametrize("changes", BREACHES, ids=str)
def test_a_submission_that_breaks_the_rules_costs_its_senders_link(company: Company, changes: dict[str, Any]) -> None:
    company.ask()
    company.turn()
    link = company.send(Kind.SUBMIT, submission(**changes))
    company.ask("a")
    company.check()
    assert link.closed is not None
    assert company.rogue.heard == {}


def test_an_id_that_is_under_way_is_not_taken_again(company: Company) -> None:
    """Whose it is goes on; who takes it again loses its link, and no link between workers is lost for it."""
    company.rogue.heard["r7"] = Heard(9, GOOD, "b", "b")
    company.rogue.links["b"].send(Kind.SUBMIT, pack(submission(id="r7", params={"max_tokens": 300})))
    company.turn()
    company.send(Kind.SUBMIT, submission(id="r7"))  # to `a`, which asks `b` to go on with it
    company.ask()
    company.ask("a")
    for _ in range(4):
        company.turn()
    assert [error["code"] for error in company.rogue.heard["r7"].errors] == ["busy"]
    link = company.send(Kind.SUBMIT, submission(id="r1"))
    company.check()
    assert link.closed is not None
    assert company.kv.closed is None


def opening(**changes: Any) -> dict[str, Any]:
    """A sound KV_OPEN but for the changes."""
    params = {**GOOD.to_wire(), **changes.pop("params", {})}
    body = {"number": 900, "id": "bad", "front": "front-0", "prompt": [5] * 9, "params": params, "carrier": {}}
    return {**body, "deadline": time.time() + 60, "priority": 0, "caller": "", **changes}


@pytest.mark.parametrize(("changes", "reason"), UNFIT, ids=lambda value: value if isinstance(value, str) else "")
def test_a_decode_worker_refuses_by_name_what_it_could_not_go_on_with(
    company: Company, changes: dict[str, Any], reason: str
) -> None:
    prefill = company.peer("prefill-0", company.b)
    company.ask()
    prefill.links["b"].send(Kind.KV_OPEN, pack(opening(**changes)))
    company.check()
    heard = [event.message for event in prefill.reactor.poll(0) if isinstance(event, Received)]
    assert [message.kind for message in heard] == [Kind.KV_REFUSED]
    refused = unpack(heard[0].meta)
    assert (refused["number"], refused["code"]) == (900, "invalid")
    assert reason in refused["reason"]


def test_a_refusal_keeps_its_code_on_the_way_to_the_front_end(company: Company) -> None:
    decode = company.peer("decode-0", company.a)
    company.rogue.submit("a", "decode-0", 9, GOOD)
    company.turn()
    decode.links["a"].send(Kind.KV_REFUSED, pack({"number": 1, "code": "invalid", "reason": "it is too long"}))
    company.check()
    (error,) = company.rogue.heard["r0"].errors
    told = {"message": "decode worker decode-0 refused: it is too long", "by": "decode-0"}
    assert error == {"code": "invalid", **told}


@pytest.mark.parametrize("have", [10, -1, 2.5, "all", None])
def test_a_worker_that_says_it_has_more_than_the_prompt_loses_its_link(company: Company, have: Any) -> None:
    decode = company.peer("decode-0", company.a)
    company.rogue.heard["bad"] = Heard(9, GOOD, "a", "decode-0")
    company.send(Kind.SUBMIT, submission(decode="decode-0"))
    company.turn()
    company.ask()
    decode.links["a"].send(Kind.KV_ACCEPTED, pack({"number": 1, "have": have}))
    company.check()
    assert [error["code"] for error in company.rogue.heard["bad"].errors] == ["unavailable"]


@pytest.mark.parametrize(
    "told",
    [{"token_id": VOCAB}, {"token_id": -1}, {"token_id": "x"}, {"drafts": [3, VOCAB]}, {"drafts": [2.5]}],
    ids=str,
)
def test_a_first_token_that_no_vocabulary_has_costs_the_link_it_came_by(company: Company, told: dict[str, Any]) -> None:
    """It would fail the step of everybody who decodes there."""
    prefill = company.peer("prefill-0", company.b)
    company.rogue.heard["bad"] = Heard(9, GOOD, "a", "b")
    company.ask()
    prefill.links["b"].send(Kind.KV_OPEN, pack(opening(front="front-1")))
    company.turn()
    prefill.links["b"].send(Kind.KV_DONE, pack({"number": 900, "token_id": 3, "drafts": [], **told}))
    company.check()
    assert [error["code"] for error in company.rogue.heard["bad"].errors] == ["unavailable"]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3),
    max_leaves=5,
)
FIELDS = ["id", "prompt", "decode", "params", "carrier", "deadline", "front", "priority", "caller"]
PARAMS = list(GOOD.to_wire())


@settings(max_examples=40, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=2),
    params=st.dictionaries(st.sampled_from(PARAMS), JUNK, max_size=2),
    then=st.lists(st.tuples(st.sampled_from(list(Kind)), JUNK | st.fixed_dictionaries({"id": JUNK, "number": JUNK}))),
)
def test_whatever_a_peer_says_the_requests_of_others_are_served(
    changes: dict[str, Any], params: dict[str, Any], then: list[tuple[Kind, Any]]
) -> None:
    company = Company()
    company.rogue.heard["bad"] = Heard(9, GOOD, "a", "b")
    try:
        company.ask()
        company.turn()
        company.rogue.heard |= {key: Heard(9, GOOD, "a", "b") for key in [changes.get("id")] if type(key) is str}
        company.send(Kind.SUBMIT, {**submission(params=params), **changes})
        company.ask("a")
        company.turn()
        for kind, body in then:
            if company.rogue.links["a"].closed is None:
                company.send(kind, body)
        company.rogue.links["b"].close("it has said enough")
        company.turn()
        company.rogue.links["a"].close("it has said enough")
        company.check()
    finally:
        for side in company.sides:
            side.reactor.close()
