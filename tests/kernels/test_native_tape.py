"""Noted kernel calls: again over the same memory, with its new contents; and their own errors."""

from __future__ import annotations

import threading

import pytest
import torch

from braid.kernels import native
from braid.kernels.native_tape import noted

DTYPES = pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32,) if native.available(dtype)])


@DTYPES
def test_calls_are_made_again_in_order_with_what_the_memory_holds_now(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (native.pack(torch.randn(40, 40, generator=generator, dtype=dtype)) for _ in range(2))
    x, middle, out = (torch.zeros(3, 40, dtype=dtype) for _ in range(3))

    def work() -> None:
        native.linear(x, first, out=middle)
        native.linear(middle, second, out=out)

    play = noted(work)
    for _ in range(3):
        x.normal_(generator=generator)
        expected = native.linear(native.linear(x, first), second)
        play()
        assert torch.equal(out, expected)


@DTYPES
def test_an_error_of_a_noted_call_is_raised_again(dtype: torch.dtype) -> None:
    x, out = torch.zeros(2, 16, dtype=dtype), torch.zeros(2, 16, dtype=dtype)
    w13 = native.pack_stack(torch.zeros(2, 16, 16, dtype=dtype), is_gate_up=True)
    w2 = native.pack_stack(torch.zeros(2, 16, 8, dtype=dtype))
    rows, experts = torch.tensor([0, 1]), torch.tensor([0, 1])
    play = noted(lambda: native.grouped_mlp(x, rows, experts, w13, w2, out=out))
    experts[1] = 2
    with pytest.raises(IndexError):
        play()


@DTYPES
def test_calls_of_another_thread_are_not_noted(dtype: torch.dtype) -> None:
    w, x = native.pack(torch.eye(16, dtype=dtype)), torch.ones(1, 16, dtype=dtype)
    mine, others = torch.zeros(1, 16, dtype=dtype), torch.zeros(1, 16, dtype=dtype)

    def work() -> None:
        thread = threading.Thread(target=lambda: native.linear(x, w, out=others))
        thread.start()
        thread.join()
        native.linear(x, w, out=mine)

    play = noted(work)
    mine.zero_()
    others.zero_()
    play()
    assert (float(mine.sum()), float(others.sum())) == (16.0, 0.0)
