"""Decode steps that only repeat what a CUDA graph would have captured, in the interpreter, keep their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton_models import BF16, BLOCKS, CPU, FP8, Loaded, WriteCheckpoint, run, token_ids, triton_ops

from braid.kernels.gpu.attention_decode import DecodePlan
from braid.model.checkpoint import Checkpoint
from braid.model.deepseek import Batch, Segment
from braid.model.experts import LocalExperts
from braid.model.kv_cache import LatentCache
from braid.model.mtp import MtpModule
from braid.model.step_buffers import StepBuffers
from braid.model.triton_ops import TritonOps

Call = Callable[[], object]


# The host would wait, or memory outside of the graph's would be asked for.
NOT_IN_A_GRAPH = {"_local_scalar_dense", "nonzero", "masked_select", "_pin_memory", "_to_copy", "lift_fresh", "index"}


class Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every kernel launch and every operation of torch, with the very tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.temporaries: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert name not in NOT_IN_A_GRAPH, f"{name} in what a graph is captured of"
        out = func(*args, **kwargs)
        if "empty" in name:
            self.temporaries.append(out)
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
        elif not func.is_view and "empty" not in name:
            self.calls.append(lambda: out.copy_(func(*args, **kwargs)))
        return out

    def play(self) -> None:
        """Between two times other graphs use what these calls leave in temporary memory."""
        for call in (self._spoil, *self.calls, self._spoil):
            call()

    def _spoil(self) -> None:
        """NaN, or -1."""
        for memory in self.temporaries:
            memory.view(torch.uint8).fill_(255)

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

    num_played = 0

    def __init__(self, path: Path) -> None:
        super().__init__(CPU, Checkpoint(path).config.quantization)
        self._plans: dict[int, DecodePlan] = {}
        self._cache: list[Tensor] = []
        self._buffers: list[StepBuffers] = []

    def watch(self, cache: LatentCache, buffers: list[StepBuffers]) -> None:
        """The memory that passes work on; `buffers` may grow."""
        self._cache, self._buffers = cache.layers, buffers

    def plan_decode(
        self,
        positions: Tensor,
        block_tables: Tensor,
        firsts: Tensor,
        num_heads: int,
        latent_dim: int,
        before: DecodePlan | None = None,
    ) -> DecodePlan:
        """A step's inputs keep the plan with them where there is a GPU."""
        kept, numbers = self._plans.get(positions.data_ptr()), (positions, block_tables, firsts)
        plan = self._plans[positions.data_ptr()] = super().plan_decode(*numbers, num_heads, latent_dim, kept)
        return plan

    def noted(self, work: Callable[[], object]) -> Call:
        work()
        memory = [*self._cache, *(memory for buffers in self._buffers for memory in buffers._memory.values())]
        before, capture = [kept.clone() for kept in memory], Capture()
        with capture, capture.launches():
            work()
        assert capture.temporaries
        for kept, first in zip(memory, before, strict=True):
            kept.copy_(first)

        def play() -> None:
            self.num_played += 1
            capture.play()

        return play


def test_steps_that_are_played_keep_their_bits(write_checkpoint: WriteCheckpoint) -> None:
    path, ids = write_checkpoint(dtype="fp8", changes=FP8), token_ids(8)
    ops = CapturedOps(path)
    played, plain = Loaded.of(path, BF16, ops).network(), Loaded.of(path, BF16, triton_ops(path)).network()
    ops.watch(played.cache, played._buffers)
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
        got, expected = (run(network, ids[start:stop], start, start > 0) for network in (played, plain))
        assert torch.equal(got, expected), start
    assert ops.num_played == 3


def test_a_step_that_is_played_follows_whose_rows_share_tiles(write_checkpoint: WriteCheckpoint) -> None:
    """Three rows each time: first one and two of two sequences, then all of them one sequence's."""
    path, ids = write_checkpoint(dtype="fp8", changes=FP8), token_ids(9)
    ops = CapturedOps(path)
    played, plain = Loaded.of(path, BF16, ops).network(), Loaded.of(path, BF16, triton_ops(path)).network()
    ops.watch(played.cache, played._buffers)
    tables = BLOCKS[:1], BLOCKS[1:2]
    for starts, nums in (((0, 0), (2, 2)), ((2, 2), (1, 2)), ((3, 4), (3, 0))):
        own_ids = torch.cat([ids[start : start + num] for start, num in zip(starts, nums, strict=True)])
        spans = zip(starts, nums, tables, strict=True)
        segments = [Segment(start, num, table, start > 0) for start, num, table in spans]
        batch = Batch(own_ids, segments, torch.arange(len(own_ids)))
        assert torch.equal(played.forward(batch).logits, plain.forward(batch).logits), starts
    assert ops.num_played == 1


def test_a_draft_that_is_played_keeps_its_bits(write_checkpoint: WriteCheckpoint) -> None:
    """Two rows each time, of which the head reads one and then the other; their outputs stay until the next pass."""
    path, ids = write_checkpoint(dtype="fp8", changes=FP8), token_ids(8)
    ops, drafts = CapturedOps(path), []
    for each in (ops, triton_ops(path)):
        loaded = Loaded.of(path, BF16, each)
        network = loaded.network()
        config, cache = network.config, network.cache
        module = MtpModule(config, loaded.weights.mtp[0], cache, LocalExperts(loaded.experts), network.rope)
        if each is ops:
            ops.watch(cache, [module._buffers])
        hidden = torch.randn(8, config.hidden_size, generator=torch.Generator().manual_seed(2)).to(BF16)
        found = []
        for start, stop, row in ((0, 4, 3), (4, 6, 1), (6, 8, 0)):
            segment = Segment(start, stop - start, BLOCKS, start > 0)
            drafted = module.draft(hidden[start:stop], ids[start:stop], [segment], torch.tensor([row]))
            found += [drafted.logits.clone(), drafted.hidden.clone()]
        drafts.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*drafts, strict=True))
    assert ops.num_played == 1
