"""Drafts verified over a scripted network: the answers are those without drafts, whatever comes of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from markov_engines import VOCAB, Always, Make, chain, loops, near
from scripted_engines import CONFIG, Front, Heard, connect

from braid.actors.kv_transfer import checksum_of
from braid.actors.messages import KV_LAYER, Kind, pack
from braid.actors.speculation import MAX_DEPTH
from braid.actors.unseen_rows import MAX_STEPS
from braid.model.deepseek import Batch, ForwardOutput
from braid.model.sampling_params import SamplingParams


@pytest.fixture
def make() -> Iterator[Make]:
    with loops() as made:
        yield made


def shown(answers: list[Heard]) -> list[Any]:
    return [
        ([answer.tokens[index] for index in sorted(answer.tokens)], answer.finishes, answer.errors)
        for answer in answers
    ]


REQUESTS = [
    (3, SamplingParams(12, temperature=0.0)),
    (70, SamplingParams(13, temperature=0.0, ignore_eos=True)),
    (9, SamplingParams(40, temperature=1.0, seed=1)),
    (5, SamplingParams(2, temperature=1.0, seed=2)),
    (6, SamplingParams(1, temperature=1.0, seed=3)),
    (64, SamplingParams(90, temperature=0.7, seed=4, top_p=0.9, ignore_eos=True)),
    (8, SamplingParams(30, temperature=1.2, seed=5, top_k=6, min_p=0.02, min_tokens=25)),
    (8, SamplingParams(30, temperature=1.0, seed=6, stop_token_ids=tuple(range(0, VOCAB, 7)), min_tokens=4)),
    (8, SamplingParams(30, temperature=1.0, seed=7, stop_token_ids=tuple(range(0, VOCAB, 3)))),
    (100, SamplingParams(3, temperature=1.0, seed=8, ignore_eos=True)),
]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("noise", [0.0, 0.7, 5.0], ids=["perfect", "near", "far"])
def test_answers_are_those_without_drafts(make: Make, depth: int, noise: float) -> None:
    target = chain(1)
    plain, drafting = make(target, None), make(target, near(target, noise=noise), depth)
    expected = shown(plain.ask(REQUESTS))
    assert shown(drafting.ask(REQUESTS)) == expected
    assert {finish for _, finishes, _ in expected for finish in finishes} == {"stop", "length"}
    drafter = drafting.drafter
    assert (drafter.num_drafted > 0) == (depth > 0)
    assert (drafter.num_accepted == drafter.num_drafted) == (depth == 0 or noise == 0)
    assert not drafting.module.has_gaps or not depth


def test_perfect_drafts_give_a_step_three_tokens(make: Make) -> None:
    target = chain(1)
    loop = make(target, target)
    loop.ask([(4, SamplingParams(31, temperature=1.0, seed=3, ignore_eos=True))])
    assert loop.worker.requests.counters["steps"] == 1 + 10
    assert loop.drafter.num_accepted == loop.drafter.num_drafted == 20


def test_of_the_drafts_that_come_with_a_prompt_no_more_are_taken_than_are_drafted_here(make: Make) -> None:
    loop, prefill = make(chain(0), near(chain(0))), Front("prefill-0")
    connect(loop.worker, prefill)
    prefill.listen()
    loop.worker.listen()
    params = SamplingParams(12, temperature=0.0, ignore_eos=True)
    tokens = [5]
    while len(tokens) < 13:
        tokens.append(int(chain(0)[tokens[-1]].argmax()))
    loop.front.heard["r0"] = Heard(1, params, "a", "a")
    opened = {"number": 1, "id": "r0", "front": "front-0", "prompt": tokens[:1], "params": params.to_wire()}
    opened |= {"carrier": {}, "deadline": time.time() + 60, "priority": 0, "caller": ""}
    link, row = prefill.links["a"], bytes(4 * CONFIG.latent_dim)
    link.send(Kind.KV_OPEN, pack(opened))
    for layer in range(2):
        link.send(Kind.KV_LAYER, KV_LAYER.pack(layer, 1, 0, 1, checksum_of([memoryview(row)])), row)
    link.send(Kind.KV_DONE, pack({"number": 1, "token_id": tokens[1], "drafts": tokens[2:9]}))
    while not loop.front.heard["r0"].finishes:
        loop.worker.turn()
        loop.front.listen()
    told = loop.front.heard["r0"]
    assert (told.finishes, [told.tokens[index] for index in sorted(told.tokens)]) == (["length"], tokens[2:])
    prefill.reactor.close()


def test_no_draft_reaches_beyond_max_tokens(make: Make) -> None:
    target = chain(1)
    loop = make(target, near(target, noise=9.0))
    loop.ask([(4, SamplingParams(5, temperature=0.0, ignore_eos=True))])
    assert loop.model.num_rows <= 4 + sum(1 + min(MAX_DEPTH, left) for left in range(4))


def test_rows_missed_while_nothing_was_drafted_are_made_up_for(make: Make) -> None:
    """Depths that come and go leave no hole in the module's layer, up to the steps that are remembered."""
    target = chain(1)
    loop = make(target, near(target), 2)
    policy = cast(Always, loop.drafter.speculation)
    depths = itertools.cycle([2, 0, 0, 1, 0, 2, 2] + [0] * (MAX_STEPS - 1) + [1])
    policy.start = lambda num_sequences: setattr(policy, "wanted", next(depths))
    loop.ask([(70, SamplingParams(300, temperature=1.0, seed=2, ignore_eos=True)), *REQUESTS])
    assert not loop.module.has_gaps
    assert loop.drafter.num_drafted > 0


# ---- what goes wrong


def test_a_draft_whose_expert_is_lost_counts_as_wrong_and_nothing_fails(make: Make) -> None:
    target = chain(1)
    expected = shown(make(target, None).ask(REQUESTS))
    loop = make(target, target)
    forward, dice = loop.model.forward, np.random.default_rng(0)

    def losing(batch: Batch, on_layer: Any = None, micro_batches: int = 1) -> ForwardOutput:
        row = 0
        for segment in batch.segments:
            if segment.absorbed and segment.num > 1:
                loop.worker.experts.failed[row + int(dice.integers(1, segment.num))] = "gone"
            row += segment.num
        output: ForwardOutput = forward(batch, on_layer)
        return output

    loop.model.forward = losing
    assert shown(loop.ask(REQUESTS)) == expected
    assert 0 < loop.drafter.num_accepted < loop.drafter.num_drafted


def test_a_known_row_whose_expert_is_lost_fails_its_sequence_only(make: Make) -> None:
    target = chain(1)
    expected = shown(make(target, None).ask(REQUESTS[:3]))
    loop = make(target, target)
    forward = loop.model.forward

    def losing(batch: Batch, on_layer: Any = None, micro_batches: int = 1) -> ForwardOutput:
        if len(batch.segments) == 3 and all(segment.absorbed for segment in batch.segments):
            loop.worker.experts.failed[batch.segments[0].num] = "no live replica"  # the second one's first row
        output: ForwardOutput = forward(batch, on_layer)
        return output

    loop.model.forward = losing
    answers = shown(loop.ask(REQUESTS[:3]))
    assert answers[0] == expected[0]
    assert answers[2] == expected[2]
    assert answers[1][1:] == (["error"], [{"code": "unavailable", "message": "no live replica", "by": "a"}])


def test_a_drafter_that_loses_experts_drafts_nothing_and_fails_nothing(make: Make) -> None:
    target = chain(1)
    expected = shown(make(target, None).ask(REQUESTS))
    loop = make(target, target)
    loop.module.lose = lambda: loop.worker.experts.failed.update(dict.fromkeys(range(200), "gone"))
    assert shown(loop.ask(REQUESTS)) == expected
    assert loop.drafter.num_drafted == 0


def test_a_drafter_without_sense_drafts_nothing(make: Make) -> None:
    target = chain(1)
    loop = make(target, torch.full_like(target, torch.nan))
    assert shown(loop.ask(REQUESTS)) == shown(make(target, None).ask(REQUESTS))
    assert loop.drafter.num_drafted == 0


def test_logits_without_sense_fail_a_sequence_where_they_would_without_drafts(make: Make) -> None:
    """Also where they are those of an accepted draft: the tokens before it are answered first."""
    target = chain(1)
    target[4] = torch.nan
    requests = [(6, SamplingParams(40, temperature=1.0, seed=seed, ignore_eos=True)) for seed in range(12)]
    expected = shown(make(target, None).ask(requests))
    assert {finish for _, finishes, _ in expected for finish in finishes} == {"error", "length"}
    assert shown(make(target, near(target)).ask(requests)) == expected


def test_everything_banned_is_the_callers_mistake_also_behind_a_draft(make: Make) -> None:
    target = chain(1)
    params = SamplingParams(9, temperature=1.0, seed=1, min_tokens=9, stop_token_ids=tuple(range(VOCAB)))
    (answer,) = shown(make(target, target).ask([(4, params)]))
    assert answer[1] == ["error"]
    assert answer[2][0]["code"] == "invalid"


def test_a_cancelled_sequence_leaves_nothing_behind(make: Make) -> None:
    target = chain(1)
    loop = make(target, near(target))
    name = loop.front.submit("a", "a", 9, SamplingParams(400, temperature=1.0, ignore_eos=True))
    for _ in range(5):
        loop.worker.turn()
    loop.front.cancel(name)
    for _ in range(3):
        loop.worker.turn()
    loop.worker.assert_empty()
