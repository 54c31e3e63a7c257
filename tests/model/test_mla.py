"""Where a batch's rows go in the cache and which form each takes."""

from __future__ import annotations

from braid.model.kv_cache import BLOCK_SIZE
from braid.model.mla import Segment, plan_attention


def test_plan_places_every_row() -> None:
    plan = plan_attention(
        [
            Segment(62, 4, [5, 3, 9], absorbed=False),
            Segment(130, 2, [0, 1, 2], absorbed=True),
            Segment(0, 1, [7], absorbed=False),
            Segment(5, 1, [4], absorbed=True),
        ],
        latent_dim=48,
    )
    assert plan.positions.tolist() == [62, 63, 64, 65, 130, 131, 0, 5]
    blocks_and_offsets = [(5, 62), (5, 63), (3, 0), (3, 1), (2, 2), (2, 3), (7, 0), (4, 5)]
    assert plan.slots.tolist() == [block * BLOCK_SIZE + offset for block, offset in blocks_and_offsets]
    assert [(rows.start, rows.stop, p.start, p.num) for rows, p in plan.prefill] == [(0, 4, 62, 4), (6, 7, 0, 1)]
    assert plan.absorbed_rows.tolist() == [4, 5, 7]
    assert plan.decode is not None
    assert [split.rows.tolist() for split in plan.decode.splits] == [[0, 1, 2]]
    slots = plan.decode.splits[0].slots.view(3, -1).tolist()  # a hidden key's is the first one, which can be read
    assert slots == [[*range(131), *[0] * 125], [*range(132), *[0] * 124], [*range(256, 262), *[256] * 250]]
    hidden = plan.decode.splits[0].hidden
    assert hidden is not None
    assert (~hidden).sum(2).flatten().tolist() == [131, 132, 6]


def test_a_row_visits_only_splits_it_sees() -> None:
    table = list(range(10))
    plan = plan_attention([Segment(255, 2, table, absorbed=True), Segment(600, 1, table, absorbed=True)], 48)
    assert plan.decode is not None
    assert [split.rows.tolist() for split in plan.decode.splits] == [[0, 1, 2], [1, 2], [2]]
    assert plan.decode.splits[0].hidden is None
    assert plan.decode.splits[1].slots.view(2, -1)[1].tolist() == list(range(256, 512))


def test_empty_parts_are_allowed() -> None:
    assert plan_attention([], 48).decode is None
    assert plan_attention([Segment(3, 0, [0], absorbed=False)], 48).prefill == ()
