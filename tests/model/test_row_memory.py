"""Memory for rows that noted calls go on naming."""

from __future__ import annotations

import weakref

import torch

from braid.model.row_memory import RowMemory

LIKE = torch.zeros(1, 3, dtype=torch.bfloat16)


def test_the_least_that_is_enough_is_used_again() -> None:
    memory = RowMemory()
    small, large = memory.take(4, LIKE), memory.take(90, LIKE)
    assert (small.shape, large.shape, small.dtype) == ((4, 3), (90, 3), torch.bfloat16)
    memory.give_back(large)
    memory.give_back(small)
    assert memory.take(3, LIKE) is small
    assert memory.take(3, LIKE) is large


def test_it_grows_in_few_steps() -> None:
    memory, shapes = RowMemory(), set()
    for num_rows in range(1, 200):
        taken = memory.take(num_rows, LIKE)
        shapes.add(taken.shape)
        memory.give_back(taken)
    assert len(shapes) <= 9


def test_what_a_step_that_broke_off_had_taken_stays_where_it_is() -> None:
    memory = RowMemory()
    taken = weakref.ref(memory.take(4, LIKE))
    assert taken() is not None, "noted calls may write there still"
