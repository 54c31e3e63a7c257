"""Steps that only play noted kernel calls give the bits of steps that make them, whatever came in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from small_models import FAMILIES, SmallModel, shuffled_table, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.native_ops import NativeOps
from braid.model.tapes import Tapes
from braid.model.torch_ops import TorchOps

# Rows, first position and form of each step: sizes that come back, memory that grows, tables that widen.
STEPS = [(3, 60), (3, 61), (1, 62), (3, 63), (3, 64), (8, 63), (3, 65), (150, 0), (1, 130), (3, 128), (3, 129)]


@dataclass
class Elsewhere:
    """Experts that are not the network's own: their calls are none of its tapes'."""

    inner: LocalExperts
    can_be_noted: bool = False

    def dispatch(self, layer: int, x: Tensor, topk_idx: Tensor, first_row: int = 0) -> Any:
        return self.inner.dispatch(layer, x.clone(), topk_idx.clone())

    def collect(self, handle: Any) -> Tensor:
        return self.inner.collect(handle).clone()


@dataclass(frozen=True)
class NotedOps(TorchOps):
    """Counts what is noted and what is played."""

    log: list[str] = field(default_factory=list)

    def noted(self, work: Callable[[], object]) -> Callable[[], object]:  # type: ignore[override]
        self.log.append("noted")
        work()
        return lambda: self.log.append("played")


def step(network: DeepSeekModel, small: SmallModel, num: int, start: int) -> Tensor:
    """Rows of as many sequences, or one prompt where there are many."""
    ids, rows = small.token_ids(num, seed=start), torch.arange(num)
    blocks = shuffled_table()
    segments = [Segment(start, 1, blocks[3 * i : 3 * i + 3], True) for i in range(num)]
    if num > 8:
        segments = [Segment(start, num, blocks, False)]
    logits: Tensor = network.forward(Batch(ids, segments, rows)).logits
    return logits


@pytest.mark.parametrize("is_local", [True, False], ids=["own experts", "experts elsewhere"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape_name", ["v3", "v3_odd", "v2_lite"])
def test_played_steps_keep_their_bits(shape_name: str, family: str, is_local: bool) -> None:
    small = small_model(shape_name, torch.float32, FAMILIES[family])
    local = LocalExperts(small.experts)
    network = small.network(local if is_local else Elsewhere(local))
    for latents in network.cache.layers:
        latents.normal_(generator=torch.Generator().manual_seed(0))
    before = [latents.clone() for latents in network.cache.layers]
    for num, start in STEPS * 2:
        fresh = small.network(LocalExperts(small.experts))
        for latents, other, first in zip(network.cache.layers, fresh.cache.layers, before, strict=True):
            latents.copy_(first)
            other.copy_(first)
        assert torch.equal(step(network, small, num, start), step(fresh, small, num, start)), (num, start)
        for latents, other in zip(network.cache.layers, fresh.cache.layers, strict=True):
            assert torch.equal(latents, other), (num, start)


@dataclass(frozen=True)
class CapturingOps(NativeOps):
    """Notes a second run of the work that computes nothing, as a GPU's graphs do: the memory is put back after it."""

    networks: list[DeepSeekModel] = field(default_factory=list, compare=False)

    def noted(self, work: Callable[[], object]) -> Callable[[], object]:
        work()
        (network,) = self.networks
        buffers = [memory for buffers in network._buffers for memory in buffers._memory.values()]
        memory = [*network.cache.layers, *buffers]
        before = [kept.clone() for kept in memory]
        tape = NativeOps.noted(self, work)
        for kept, first in zip(memory, before, strict=True):
            kept.copy_(first)
        return tape


@pytest.mark.parametrize("is_local", [True, False], ids=["own experts", "experts elsewhere"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family == "native"])
def test_steps_noted_by_a_second_run_keep_their_bits(family: str, is_local: bool) -> None:
    small, plain = small_model("v3", torch.float32, CapturingOps()), small_model("v3", torch.float32, FAMILIES[family])
    local = LocalExperts(small.experts)
    network, fresh = small.network(local if is_local else Elsewhere(local)), plain.network()
    assert isinstance(small.weights.ops, CapturingOps)
    small.weights.ops.networks[:] = [network]
    for latents in (*network.cache.layers, *fresh.cache.layers):
        latents.zero_()
    for num, start in STEPS * 2:
        got = step(network, small, num, start)
        assert torch.equal(got, step(fresh, plain, num, start)), (num, start)


class TorchCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every call of torch's while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family == "native"])
def test_a_steady_step_takes_memory_for_what_it_returns_only(family: str) -> None:
    small = small_model("v3", torch.float32, FAMILIES[family])
    network = small.network()
    for latents in network.cache.layers:
        latents.zero_()
    for start in range(60, 68):
        segments = [Segment(start, 1, [2 * i, 2 * i + 1], True) for i in range(3)]
        batch = Batch(small.token_ids(3), segments, torch.arange(3))
        with TorchCalls() as calls:
            network.forward(batch)
        if start not in (60, 64):  # the first step, and the first one with tables of two blocks
            assert calls.names == ["empty", "new_empty"]  # hidden and logits: they may be read when the next step runs


def test_layers_are_announced_when_a_step_is_played_too() -> None:
    for ops in FAMILIES.values():
        small, announced = small_model("v3", torch.float32, ops), list[int]()
        network = small.network()
        for latents in network.cache.layers:
            latents.zero_()
        for _ in range(2):
            batch = Batch(small.token_ids(1), [Segment(5, 1, [2], True)], torch.tensor([0]))
            network.forward(batch, announced.append)
        assert announced == [0, 1, 2, 0, 1, 2]


def test_work_is_noted_once_with_what_it_runs_inside() -> None:
    ops = NotedOps()
    tapes, done = Tapes(ops), list[str]()

    def work() -> None:
        done.append("outer")
        tapes.run("inner", lambda: done.append("inner"))

    tapes.run("outer", work)
    tapes.run("outer", work)
    assert (done, ops.log) == (["outer", "inner"], ["noted", "played"])
    tapes.forget()
    tapes.run("outer", work)
    assert ops.log == ["noted", "played", "noted"]


def test_work_that_fails_is_not_noted() -> None:
    ops = NotedOps()
    tapes = Tapes(ops)

    def fail() -> None:
        raise IndexError("expert 9")

    for _ in range(2):
        with pytest.raises(IndexError, match="expert 9"):
            tapes.run("work", fail)
    assert ops.log == ["noted", "noted"]


def test_a_family_that_notes_nothing_does_the_work_each_time() -> None:
    tapes, done = Tapes(TorchOps()), list[str]()
    for _ in range(3):
        tapes.run("work", lambda: done.append("work"))
    assert len(done) == 3
