"""Where a batch's rows go in the cache and which form each takes."""

from __future__ import annotations

import pytest
import torch
from generators import make_hf_model

from braid.model.config import ModelConfig
from braid.model.kv_cache import BLOCK_SIZE
from braid.model.mla import Segment, plan_attention
from braid.model.step_buffers import StepBuffers
from braid.model.torch_ops import TorchOps


def test_plan_places_every_row() -> None:
    plan = plan_attention(
        [
            Segment(62, 4, [5, 3, 9], absorbed=False),
            Segment(130, 2, [0, 1, 2], absorbed=True),
            Segment(5, 1, [4, 11], absorbed=True),
            Segment(0, 1, [7], absorbed=False),
            Segment(1, 1, [8], absorbed=False),
        ],
        num_heads=2,
        latent_dim=48,
        ops=TorchOps(),
    )
    assert plan.positions.tolist() == [62, 63, 64, 65, 130, 131, 5, 0, 1]
    blocks_and_offsets = [(5, 62), (5, 63), (3, 0), (3, 1), (2, 2), (2, 3), (4, 5), (7, 0), (8, 1)]
    assert plan.slots.tolist() == [block * BLOCK_SIZE + offset for block, offset in blocks_and_offsets]
    assert [(run.rows.start, run.rows.stop, run.absorbed) for run in plan.runs] == [
        (0, 4, False),
        (4, 7, True),
        (7, 8, False),
        (8, 9, False),
    ]
    assert [(run.plan.start, run.plan.num) for run in plan.runs if not run.absorbed] == [(62, 4), (0, 1), (1, 1)]
    splits = plan.runs[1].plan.splits
    assert [split.rows.tolist() for split in splits] == [[0, 1, 2]]
    slots = splits[0].slots.view(3, -1).tolist()  # a hidden key's is the first one, which can be read
    assert slots == [[*range(131), *[0] * 125], [*range(132), *[0] * 124], [*range(256, 262), *[256] * 250]]
    assert (~splits[0].hidden).sum(2).flatten().tolist() == [131, 132, 6]


def test_a_row_visits_only_splits_it_sees() -> None:
    segments = [Segment(255, 2, list(range(10)), absorbed=True), Segment(600, 1, list(range(10)), absorbed=True)]
    (run,) = plan_attention(segments, 2, 48, TorchOps()).runs
    assert [split.rows.tolist() for split in run.plan.splits] == [[0, 1, 2], [1, 2], [2]]
    assert run.plan.splits[0].hidden is None
    assert run.plan.splits[1].slots.view(2, -1)[1].tolist() == list(range(256, 512))


def test_memory_that_stays_says_what_a_fresh_plan_says() -> None:
    """Also where a table has the length it had, but other blocks, and where rows come and go."""
    config = ModelConfig.from_dict(make_hf_model("v3")[1])
    buffers = StepBuffers(config, torch.float32, TorchOps())
    steps = [
        [(130, 2, [4, 1, 2]), (5, 1, [7])],
        [(132, 2, [4, 1, 2]), (6, 1, [7])],
        [(134, 2, [4, 3, 2]), (7, 1, [8])],  # preempted, and given other blocks
        [(7, 1, [8]), (134, 2, [4, 3, 2])],
        [(136, 1, [4, 3, 2])],
    ]
    for step in steps:
        segments = [Segment(*each, absorbed=True) for each in step]
        plan, expected = (plan_attention(segments, 2, 48, TorchOps(), at) for at in (buffers, None))
        assert plan.positions.tolist() == expected.positions.tolist()
        assert plan.slots.tolist() == expected.slots.tolist()
        for split, other in zip(plan.runs[0].plan.splits, expected.runs[0].plan.splits, strict=True):
            seen = torch.ones_like(other.slots, dtype=torch.bool) if other.hidden is None else ~other.hidden.flatten()
            assert split.rows.tolist() == other.rows.tolist()
            assert split.slots.flatten()[seen.flatten()].tolist() == other.slots.flatten()[seen.flatten()].tolist()


def test_empty_parts_are_allowed() -> None:
    assert plan_attention([], 2, 48, TorchOps()).runs == ()
    assert plan_attention([Segment(3, 0, [0], absorbed=False)], 2, 48, TorchOps()).runs == ()


def test_blocks_that_do_not_reach_are_refused() -> None:
    with pytest.raises(AssertionError, match="1 blocks do not reach position 64"):
        plan_attention([Segment(60, 5, [3], absorbed=True)], 2, 48, TorchOps())
