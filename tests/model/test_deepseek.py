"""A row's logits have the same bits whatever the chunking, the neighbours, the blocks and the owner of its experts."""

from __future__ import annotations

import pytest
import torch
from small_models import FAMILIES, SmallModel, run, run_in_chunks, shuffled_table, small_model
from torch import Tensor

from braid.model.deepseek import Batch, Segment
from braid.model.kv_cache import BLOCK_SIZE
from braid.model.network_weights import ExpertWeights, build_experts
from braid.model.ops import Ops

F32, BF16 = torch.float32, torch.bfloat16
MODELS = [("v3", F32), ("v3", BF16), ("v3_odd", F32), ("v3_odd", BF16), ("v2_lite", F32)]
FORMS = pytest.mark.parametrize("absorbed", [False, True], ids=["prompt form", "absorbed form"])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Ops:
    ops: Ops = FAMILIES[request.param]
    return ops


@pytest.fixture(params=MODELS, ids=lambda param: f"{param[0]}-{param[1]}")
def small(request: pytest.FixtureRequest, family: Ops) -> SmallModel:
    return small_model(*request.param, family)


@FORMS
@pytest.mark.parametrize("sizes", [(1, 2, 69), (3,), (31, 1), (64,)], ids=str)
def test_chunks_change_no_bits(small: SmallModel, sizes: tuple[int, ...], absorbed: bool) -> None:
    ids, table = small.token_ids(70), shuffled_table()
    whole = run(small.network(), ids, 0, table, absorbed)
    assert torch.equal(run_in_chunks(small.network(), ids, sizes, table, absorbed), whole)


@FORMS
def test_chunks_across_splits_change_no_bits(absorbed: bool, family: Ops) -> None:
    small, table = small_model("v3", F32, family), shuffled_table()
    ids = small.token_ids(530)
    whole = run(small.network(), ids, 0, table, absorbed)
    for sizes in ((255, 2, 100), (64,), (300, 1, 211)):
        assert torch.equal(run_in_chunks(small.network(), ids, sizes, table, absorbed), whole)


@pytest.mark.parametrize("shape_name", ["v3", "v3_odd"])
def test_two_threads_change_no_bits_between_chunks(shape_name: str, family: Ops) -> None:
    """Threads cut a product's rows, so that 5 to 11 of them used to round otherwise."""
    small, table = small_model(shape_name, F32, family), shuffled_table()
    ids, before = small.token_ids(40), torch.get_num_threads()
    family.set_threads(2)
    try:
        whole = run(small.network(), ids, 0, table)
        assert torch.equal(run_in_chunks(small.network(), ids, (6, 11, 1, 22), table), whole)
    finally:
        family.set_threads(1)
        torch.set_num_threads(before)


@FORMS
def test_block_table_changes_no_bits(small: SmallModel, absorbed: bool) -> None:
    ids = small.token_ids(130)
    answers = [run(small.network(), ids, 0, shuffled_table(seed)[: 3 + seed], absorbed) for seed in (0, 1, 2)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def sequence_steps(small: SmallModel) -> list[tuple[Tensor, list[int], list[Tensor]]]:
    """Three sequences with blocks of their own, 90, 7 and 65 prompt rows, then 3 decoded: ids, table, logits."""
    tables = shuffled_table(3)
    sequences = []
    for i, num_prompt in enumerate((90, 7, 65)):
        ids, table = small.token_ids(num_prompt + 3, seed=10 + i), tables[4 * i : 4 * i + 4]
        network = small.network()
        alone = [run(network, ids[:num_prompt], 0, table)]
        alone += [run(network, ids[at : at + 1], at, table, absorbed=True) for at in range(num_prompt, len(ids))]
        sequences.append((ids, table, alone))
    return sequences


def test_neighbours_change_no_bits(small: SmallModel) -> None:
    (ids_a, table_a, alone_a), (ids_b, table_b, alone_b), (ids_c, table_c, alone_c) = sequence_steps(small)
    network = small.network()

    def step(*parts: tuple[Tensor, int, int, list[int], bool]) -> list[Tensor]:
        segments = [Segment(start, end - start, table, absorbed) for _, start, end, table, absorbed in parts]
        ids = torch.cat([ids[start:end] for ids, start, end, _, _ in parts])
        logits = network.forward(Batch(ids, segments, torch.arange(len(ids)))).logits
        return list(logits.split([segment.num for segment in segments]))

    a, c = step((ids_a, 0, 90, table_a, False), (ids_c, 0, 20, table_c, False))
    assert torch.equal(a, alone_a[0])
    assert torch.equal(c, alone_c[0][:20])
    a, b, c = step((ids_a, 90, 91, table_a, True), (ids_b, 0, 7, table_b, False), (ids_c, 20, 65, table_c, False))
    assert torch.equal(a, alone_a[1])
    assert torch.equal(b, alone_b[0])
    assert torch.equal(c, alone_c[0][20:])
    # one row of b, two of a and three of c at once, as in replay and MTP verification
    b, c, a = step((ids_b, 7, 8, table_b, True), (ids_c, 65, 68, table_c, True), (ids_a, 91, 93, table_a, True))
    assert torch.equal(b, alone_b[1])
    assert torch.equal(c, torch.cat(alone_c[1:]))
    assert torch.equal(a, torch.cat(alone_a[2:]))


class ScatteredExperts:
    """Experts on three owners in odd orders; each owner computes its pairs alone and the last pairs first."""

    can_be_noted = False

    def __init__(self, small: SmallModel) -> None:
        self.owners = [self.stacks_of(small, owner) for owner in range(3)]

    @staticmethod
    def stacks_of(small: SmallModel, owner: int) -> dict[int, ExpertWeights]:
        dtype, ops = small.weights.norm.dtype, small.weights.ops
        ids = [e for e in reversed(small.experts[2].expert_ids) if (e * 5) % 3 == owner]

        def read(*names: str) -> Tensor:
            return torch.cat([small.state[name] for name in names]).to(dtype)

        return {layer: build_experts(layer, ids, read, ops) for layer in small.experts}

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor, first_row: int = 0) -> Tensor:
        num_rows, top_k = topk_idx.shape
        flat = topk_idx.flatten()
        rows = torch.full((num_rows * top_k, x.shape[1]), torch.nan, dtype=x.dtype)
        for stacks in self.owners:
            stack = stacks[layer]
            held = torch.tensor(stack.expert_ids)
            pairs = torch.isin(flat, held).nonzero().flatten().flip(0)
            local = (flat[pairs, None] == held).nonzero()[:, 1].contiguous()
            rows[pairs] = stack.ops.grouped_mlp(x, pairs // top_k, local, stack.w13, stack.w2)
        return rows.view(num_rows, top_k, -1)

    def collect(self, handle: Tensor) -> Tensor:
        return handle


def test_expert_placement_changes_no_bits(small: SmallModel) -> None:
    ids, table = small.token_ids(70), shuffled_table()
    scattered = small.network(ScatteredExperts(small))
    assert torch.equal(run(scattered, ids, 0, table), run(small.network(), ids, 0, table))


def test_prompt_and_generated_forms_agree_but_not_in_bits(family: Ops) -> None:
    small, table = small_model("v3", F32, family), shuffled_table()
    ids = small.token_ids(70)
    prompt, generated = (run(small.network(), ids, 0, table, absorbed) for absorbed in (False, True))
    assert torch.allclose(prompt, generated, atol=1e-4)
    assert not torch.equal(prompt, generated)


def test_only_the_wanted_rows_have_logits(family: Ops) -> None:
    small, table = small_model("v3", F32, family), shuffled_table()
    ids, segment = small.token_ids(30), Segment(0, 30, shuffled_table(), False)
    every = run(small.network(), ids, 0, table)
    some = small.network().forward(Batch(ids, [segment], torch.tensor([29, 3])))
    assert torch.equal(some.logits, every[[29, 3]])
    assert some.hidden.shape == (30, small.config.hidden_size)
    none = small.network().forward(Batch(ids, [segment], torch.tensor([], dtype=torch.int64)))
    assert none.logits.shape == (0, small.config.vocab_size)


def test_layers_are_announced_when_their_latents_are_written() -> None:
    small, table = small_model("v3"), shuffled_table()
    network, announced = small.network(), []

    def on_layer(layer: int) -> None:
        announced.append(layer)
        written = [~latents[table[0]].isnan().any(-1) for latents in network.cache.layers]
        assert [int(rows.sum()) for rows in written] == [9] * (layer + 1) + [0] * (
            small.config.num_hidden_layers - layer - 1
        )

    run(network, small.token_ids(9), 0, table, on_layer=on_layer)
    assert announced == list(range(small.config.num_hidden_layers))


def test_nothing_but_the_batch_is_written() -> None:
    small, table = small_model("v3"), shuffled_table()
    network = small.network()
    run(network, small.token_ids(BLOCK_SIZE + 3), 0, table)
    for latents in network.cache.layers:
        assert int((~latents.isnan().any(-1)).sum()) == BLOCK_SIZE + 3
