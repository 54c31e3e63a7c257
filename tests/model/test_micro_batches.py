"""Several micro-batches on their way at once: the same bits, and one's rows are away while the other attends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from small_models import FAMILIES, SmallModel, shuffled_table, small_model
from torch import Tensor

from braid.model.deepseek import Batch, ForwardOutput
from braid.model.experts import LocalExperts
from braid.model.micro_batch import pick_segments, split_segments
from braid.model.mla import Segment
from braid.model.ops import Ops


@dataclass
class LateExperts:
    """Computes rows only when they are collected, over memory that is lent out again afterwards."""

    inner: LocalExperts
    can_be_noted: bool = False
    log: list[tuple[str, int, int]] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor, first_row: int = 0) -> Any:
        self.log.append(("dispatch", layer, len(x)))
        self.first_rows.append(first_row)
        return layer, x, topk_idx

    def collect(self, handle: Any) -> Tensor:
        layer, x, topk_idx = handle
        self.log.append(("collect", layer, len(x)))
        return self.inner.collect(self.inner.dispatch(layer, x, topk_idx)).clone()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Ops:
    ops: Ops = FAMILIES[request.param]
    return ops


@pytest.fixture(params=[("v3", torch.float32), ("v3_odd", torch.bfloat16)], ids=str)
def small(request: pytest.FixtureRequest, family: Ops) -> SmallModel:
    return small_model(*request.param, family)


def mixed_batch(small: SmallModel) -> Batch:
    """A decoding row, a replay that goes on after its own prompt, and a prompt chunk."""
    tables = shuffled_table()
    segments = [
        Segment(0, 1, tables[:1], absorbed=True),
        Segment(0, 9, tables[1:3], absorbed=False),
        Segment(9, 4, tables[1:3], absorbed=True),
        Segment(0, 66, tables[3:6], absorbed=False),
    ]
    return Batch(small.token_ids(80), segments, torch.tensor([0, 12, 13, 79]))


def forward(small: SmallModel, experts: Any, count: int) -> ForwardOutput:
    output: ForwardOutput = small.network(experts).forward(mixed_batch(small), micro_batches=count)
    return output


@pytest.mark.parametrize("count", [2, 3, 5, 200])
@pytest.mark.parametrize("is_late", [False, True], ids=["local", "late"])
def test_the_split_changes_no_bits(small: SmallModel, count: int, is_late: bool) -> None:
    whole = forward(small, LocalExperts(small.experts), 1)
    local = LocalExperts(small.experts)
    parts = forward(small, LateExperts(local) if is_late else local, count)
    assert torch.equal(parts.logits, whole.logits)
    assert torch.equal(parts.hidden, whole.hidden)


def test_rows_of_one_are_away_while_the_other_attends() -> None:
    small = small_model("v3")
    experts = LateExperts(LocalExperts(small.experts))
    forward(small, experts, 2)
    assert experts.log == [
        ("dispatch", 1, 40),
        ("dispatch", 1, 40),
        ("collect", 1, 40),
        ("dispatch", 2, 40),
        ("collect", 1, 40),
        ("dispatch", 2, 40),
        ("collect", 2, 40),
        ("collect", 2, 40),
    ]
    assert experts.first_rows == [0, 40, 0, 40]


def test_a_layer_is_announced_once_when_all_its_latents_are_written() -> None:
    small = small_model("v3")
    network, announced = small.network(), []

    def on_layer(layer: int) -> None:
        announced.append(layer)
        assert int((~network.cache.layers[layer].isnan().any(-1)).sum()) == 80

    network.forward(mixed_batch(small), on_layer, micro_batches=3)
    assert announced == list(range(small.config.num_hidden_layers))


def test_parts_are_even_and_in_order() -> None:
    segments = [
        Segment(5, 3, [0], absorbed=True),
        Segment(0, 0, [1], absorbed=False),
        Segment(7, 7, [2], absorbed=False),
    ]
    parts = split_segments(segments, 3)
    assert [[(s.start, s.num, s.absorbed) for s in part] for part in parts] == [
        [(5, 3, True)],
        [(7, 3, False)],
        [(10, 4, False)],
    ]
    assert [[s.num for s in part] for part in split_segments(segments, 4)] == [[2], [1, 2], [2], [3]]
    assert split_segments([], 2) == [[]]


def test_picked_rows_keep_their_places_and_forms() -> None:
    segments = [
        Segment(5, 3, [0], absorbed=True),
        Segment(0, 0, [1], absorbed=False),
        Segment(7, 7, [2], absorbed=False),
    ]
    picked = pick_segments(segments, [1, 2, 3, 8, 9, 6])
    assert [(s.start, s.num, s.block_table, s.absorbed) for s in picked] == [
        (6, 2, [0], True),
        (7, 1, [2], False),
        (12, 2, [2], False),
        (10, 1, [2], False),
    ]


@pytest.mark.parametrize("rows", [[0, 12, 79], [13], [], [79, 3, 4, 5], list(range(80))], ids=str)
def test_rows_that_nobody_asks_for_end_before_the_last_layer(small: SmallModel, rows: list[int]) -> None:
    batch = mixed_batch(small)
    batch.logit_rows = torch.tensor(rows, dtype=torch.int64)
    every, network, announced = small.network(), small.network(), list[int]()
    whole = every.forward(batch)
    batch.wants_hidden = False
    output = network.forward(batch, announced.append)
    assert torch.equal(output.logits, whole.logits)
    assert torch.equal(output.hidden, whole.hidden[rows])
    assert announced == [0, 1, 2]
    for latents, expected in zip(network.cache.layers, every.cache.layers, strict=True):
        assert torch.equal(latents.nan_to_num(), expected.nan_to_num())
