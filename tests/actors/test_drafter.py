"""Drafts verified over a scripted network: the answers are those without drafts, and follow the target's distribution.

Both the network and its MTP module are Markov chains over a small vocabulary, so that every distribution is known. Each
hidden row says which position and token it belongs to; the module refuses rows that are not the ones it should read.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scripted_engines import CONFIG, Front, Heard, Worker, connect

from braid.actors.drafter import Drafter
from braid.actors.drafting import MAX_HELD_ROWS, Drafting
from braid.actors.kv_transfer import checksum_of
from braid.actors.messages import KV_LAYER, Kind, pack
from braid.actors.speculation import MAX_DEPTH, Acceptance, Speculation
from braid.model.deepseek import Batch, DeepSeekModel, ForwardOutput, Segment
from braid.model.kv_cache import BLOCK_SIZE
from braid.model.mtp import Drafted, MtpModule
from braid.model.sampling_params import SamplingParams

VOCAB = CONFIG.vocab_size
Table = npt.NDArray[np.float64]


def chain(seed: int, spread: float = 1.5) -> torch.Tensor:
    """Logits of the next token by the last one: [VOCAB, VOCAB]."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def near(table: torch.Tensor, seed: int = 9, noise: float = 0.7) -> torch.Tensor:
    """A drafter that has learnt the chain, but not quite."""
    return table + chain(seed, noise)


def rows_of(segments: list[Segment]) -> list[int]:
    return [position for segment in segments for position in range(segment.start, segment.start + segment.num)]


class MarkovModel:
    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.num_rows = 0

    def forward(self, batch: Batch, on_layer: Any = None, micro_batches: int = 1) -> ForwardOutput:
        self.num_rows += len(batch.token_ids)
        hidden = torch.tensor(list(zip(rows_of(batch.segments), batch.token_ids.tolist(), strict=True))).float()
        return ForwardOutput(self.table[batch.token_ids[batch.logit_rows]], hidden)


class MarkovModule:
    """`seen[slot]`: the position whose row lies in that slot of the module's layer of the cache."""

    def __init__(self, table: torch.Tensor, num_blocks: int) -> None:
        self.table = table
        self.seen = torch.full((num_blocks * BLOCK_SIZE,), -1)
        self.has_gaps = False
        self.lose: Callable[[], None] = lambda: None

    def draft(
        self,
        hidden: torch.Tensor,
        next_ids: torch.Tensor,
        segments: list[Segment],
        logit_rows: torch.Tensor,
        on_layer: Any = None,
    ) -> Drafted:
        positions = torch.tensor(rows_of(segments))
        assert hidden[:, 0].tolist() == positions.tolist(), "hidden rows of other positions"
        for segment in segments:
            end = segment.start + segment.num
            slots = torch.tensor(segment.block_table)[torch.arange(end) // BLOCK_SIZE] * BLOCK_SIZE
            slots += torch.arange(end) % BLOCK_SIZE
            self.seen[slots[segment.start :]] = torch.arange(segment.start, end)
            self.has_gaps |= self.seen[slots].tolist() != list(range(end))
        self.lose()
        own = torch.stack((positions + 1, next_ids), dim=1).float()
        return Drafted(self.table[next_ids[logit_rows]], own[logit_rows])


class Always(Speculation):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.wanted = depth

    def depth(self, own: Acceptance) -> int:
        return self.wanted


class Loop:
    """One worker, one front end."""

    def __init__(self, target: torch.Tensor, drafter: torch.Tensor | None, depth: int = MAX_DEPTH) -> None:
        self.front, self.worker = Front(), Worker("a", blocks=16, max_waiting=16)
        connect(self.worker, self.front)
        self.model = MarkovModel(target)
        engine = self.worker.engine
        engine.model = cast(DeepSeekModel, self.model)
        if drafter is not None:
            self.module = MarkovModule(drafter, 16)
            engine.drafter = Drafter(CONFIG, cast(MtpModule, self.module), self.worker.experts)
            engine.drafter.speculation = Always(depth)

    @property
    def drafter(self) -> Drafter:
        drafter: Drafter | None = self.worker.engine.drafter
        assert drafter is not None
        return drafter

    def ask(self, requests: list[tuple[int, SamplingParams]]) -> list[Heard]:
        """(length of the prompt, params) of each; the answers, all of which end."""
        self.worker.listen()
        names = [self.front.submit("a", "a", length, params) for length, params in requests]
        while not all(self.front.heard[name].finishes for name in names):
            self.worker.turn()
            self.front.listen()
        self.worker.turn()
        self.worker.assert_empty()
        return [self.front.heard[name] for name in names]


Make = Callable[..., Loop]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Loop] = []

    def one(*args: Any) -> Loop:
        made.append(Loop(*args))
        return made[-1]

    yield one
    for loop in made:
        loop.worker.close()
        loop.front.reactor.close()


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
    """Depths that come and go leave no hole in the module's layer, up to the rows that are held."""
    target = chain(1)
    loop = make(target, near(target), 2)
    policy = cast(Always, loop.drafter.speculation)
    depths = itertools.cycle([2, 0, 0, 1, 0, 2, 2] + [0] * (MAX_HELD_ROWS - 1) + [1])
    policy.start = lambda num_sequences: setattr(policy, "wanted", next(depths))  # type: ignore[method-assign]
    loop.ask([(70, SamplingParams(300, temperature=1.0, seed=2, ignore_eos=True)), *REQUESTS])
    assert not loop.module.has_gaps
    assert loop.drafter.num_drafted > 0


def test_more_rows_than_are_held_are_given_up() -> None:
    drafting, hidden = Drafting(Acceptance()), torch.zeros(1, 2)
    for position in range(10, 10 + MAX_HELD_ROWS + 7):
        drafting.hold(position, (hidden, 0, 1))
    assert len(drafting.take(drafting.end)) == MAX_HELD_ROWS
    assert drafting.take(drafting.end) == []
    drafting.hold(5, (hidden, 0, 1))
    assert drafting.take(7) == [], "rows of other positions"


def test_of_a_large_batch_only_the_rows_held_stay() -> None:
    drafting, hidden = Drafting(Acceptance()), torch.zeros(500, 2)
    drafting.hold(3, (hidden, 7, 2))
    ((rows, first, num),) = drafting.take(5)
    assert (rows.shape[0], first, num) == (2, 0, 2)


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
        return forward(batch, on_layer)

    loop.model.forward = losing  # type: ignore[method-assign]
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
        return forward(batch, on_layer)

    loop.model.forward = losing  # type: ignore[method-assign]
    answers = shown(loop.ask(REQUESTS[:3]))
    assert answers[0] == expected[0]
    assert answers[2] == expected[2]
    assert answers[1][1:] == (["error"], [{"code": "unavailable", "message": "no live replica"}])


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


# ---- distributions


def probabilities(logits: torch.Tensor, temperature: float = 1.0) -> Table:
    table: Table = torch.softmax(logits.double() / temperature, -1).numpy()
    return table


def coupled(p: Table, q: Table) -> list[float]:
    """Chance of each token to win two Gumbel races over the same noise, one for each distribution."""
    return [float(1 / np.maximum(p / p[i], q / q[i]).sum()) for i in range(len(p))]


def few_tokens(seed: int, spread: float) -> torch.Tensor:
    """Only tokens 0 to 3 ever come."""
    table = chain(seed, spread)
    table[:, 4:] = -torch.inf
    return table


def test_drafted_output_has_the_targets_distribution(make: Make) -> None:
    """Chi-square of all triples of tokens over fixed seeds, against the exact product of the chain."""
    target = few_tokens(1, 0.7)
    drafter = target + few_tokens(2, 0.8).clamp(min=-9)
    loop, num_seeds = make(target, drafter), 2400
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, num_seeds, 16):
        requests = [(3, SamplingParams(4, temperature=1.0, seed=first + i, ignore_eos=True)) for i in range(16)]
        for answer in loop.ask(requests):
            counts[tuple(answer.tokens[index] for index in range(1, 4))] += 1
    assert 0.3 < loop.drafter.num_accepted / loop.drafter.num_drafted < 0.9, "drafts must come true and fail"
    p = probabilities(target)
    start = p[5]  # the prompt's last token
    chi2, cells = 0.0, 0
    for triple in itertools.product(range(4), repeat=3):
        a, b, c = triple
        expected = num_seeds * float((start @ p[:, a]) * p[a, b] * p[b, c])
        chi2 += (counts[triple] - expected) ** 2 / expected
        cells += 1
        assert expected > 3, "too few seeds for this cell"
    freedom = cells - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def mean_over_steps(target: Table, both: Table, accepted: Table) -> float:
    """Mean of `accepted` (by the token before the draft) in the long run of steps that verify one draft each.

    both[i, j]: after token i, target and draft are both j. Then a token for free follows; else the target's j ends it.
    """
    turn = (target - both) + both @ target
    values, vectors = np.linalg.eig(turn.T)
    shares = np.real(vectors[:, np.argmax(np.real(values))])
    return float(shares @ accepted / shares.sum())


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_acceptance_is_that_of_coupled_races_and_close_to_rejection_samplings(make: Make, noise: float) -> None:
    target = few_tokens(1, 1.0)
    drafter = target + few_tokens(2, noise).clamp(min=-9)
    loop = make(target, drafter, 1)
    for first in range(0, 240, 16):
        loop.ask([(3, SamplingParams(20, temperature=1.0, seed=first + i, ignore_eos=True)) for i in range(16)])
    measured = loop.drafter.num_accepted / loop.drafter.num_drafted
    p, q = probabilities(target)[:4, :4], probabilities(drafter)[:4, :4]
    both = np.array([coupled(p[i], q[i]) for i in range(4)])
    races = mean_over_steps(p, both, both.sum(1))
    rejection = mean_over_steps(p, both, np.minimum(p, q).sum(1))
    assert abs(measured - races) < 4 * np.sqrt(races * (1 - races) / loop.drafter.num_drafted)
    assert rejection / (2 - rejection) <= races <= rejection
