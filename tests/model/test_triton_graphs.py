"""Decode steps that only repeat what a CUDA graph would have captured, in the interpreter, keep their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton_models import BF16, CPU, FP8, Loaded, WriteCheckpoint, run, token_ids, triton_ops

from braid.model.checkpoint import Checkpoint
from braid.model.deepseek import DeepSeekModel
from braid.model.triton_ops import TritonOps

Call = Callable[[], object]


class Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every kernel launch and every operation of torch, with the very tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
        elif not func.is_view and "empty" not in func._schema.name:
            self.calls.append(lambda: out.copy_(func(*args, **kwargs)))
        return out

    @contextmanager
    def launches(self) -> Iterator[None]:
        launch = GridExecutor.__call__

        def captured(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            self.calls.append(lambda: launch(executor, *args, **kwargs))
            with _disable_current_modes():
                launch(executor, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", captured)
            yield


class CapturedOps(TritonOps):
    """As on a GPU, but that the captured run does compute: the network's memory is put back after it."""

    network: DeepSeekModel
    num_played = 0

    def noted(self, work: Callable[[], object]) -> Call:
        work()
        buffers = [memory for buffers in self.network._buffers for memory in buffers._memory.values()]
        memory = [*self.network.cache.layers, *buffers]
        before, capture = [kept.clone() for kept in memory], Capture()
        with capture, capture.launches():
            work()
        for kept, first in zip(memory, before, strict=True):
            kept.copy_(first)

        def play() -> None:
            self.num_played += 1
            for call in capture.calls:
                call()

        return play


def test_steps_that_are_played_keep_their_bits(write_checkpoint: WriteCheckpoint) -> None:
    path, ids = write_checkpoint(dtype="fp8", changes=FP8), token_ids(8)
    ops = CapturedOps(CPU, Checkpoint(path).config.quantization)
    ops.network, plain = Loaded.of(path, BF16, ops).network(), Loaded.of(path, BF16, triton_ops(path)).network()
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
        got, expected = (run(network, ids[start:stop], start, start > 0) for network in (ops.network, plain))
        assert torch.equal(got, expected), start
    assert ops.num_played == 3
