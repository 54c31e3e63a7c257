"""Numbers that are put into memory that stays."""

from __future__ import annotations

import torch

from braid.model.to_device import Numbers


def test_few_numbers_share_memory_and_many_do_not() -> None:
    numbers = Numbers()
    for length in (3, 0, 1, Numbers.MOST, Numbers.MOST + 1, 2):
        values = [7 * place - length for place in range(length)]
        put = numbers.put(values)
        assert put.dtype == torch.int64
        assert put.tolist() == values
    few = numbers.put([1, 2])
    many = numbers.put(list(range(Numbers.MOST + 1)))
    assert few.tolist() == [1, 2]
    assert numbers.put([5]).tolist() == [5]
    assert few.tolist() == [5, 2]
    assert many[0] == 0
