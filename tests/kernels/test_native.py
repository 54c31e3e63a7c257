"""The native products against float64, row by row in bits, whatever the threads; and the pool that shares them out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from braid.kernels import _native, native
from braid.kernels.native import (
    PackedStack,
    available,
    grouped_mlp,
    head_linear,
    linear,
    pack,
    pack_stack,
    set_threads,
    swiglu_mlp,
)

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [dtype for dtype in (FP32, BF16) if available(dtype)])
# inputs, outputs: panels of 64, 48, 32 and 16 outputs; several slabs of inputs; half words; the smallest
SHAPES = [(64, 48), (40, 96), (256, 512), (130, 8), (257, 9), (66, 70), (24, 8), (2, 3), (1, 1), (3, 16), (1024, 130)]
ROW_COUNTS = [*range(1, 14), 17, 31, 33, 96, 97, 130, 193]
SUM_STEP, BF16_STEP = 2.0**-24, 2.0**-8  # half a unit in the last place


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def amid_nan(x: Tensor) -> Tensor:
    """The same numbers as a view into a tensor that holds NaN everywhere else."""
    wide = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
    view = wide[1:-1, ..., 3:-2]
    return view.copy_(x)


def assert_close(out: Tensor, wanted: Tensor, error: Tensor) -> None:
    """`error`: by how much a result may be off before it is rounded to its dtype."""
    if out.dtype == BF16:
        error = error * (1 + BF16_STEP) + wanted.abs() * BF16_STEP
    assert bool(((out.double() - wanted).abs() <= error).all())


def products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x weight^T in float64, and what a chain of fp32 sums may be off."""
    wide, wide_weight = x.double(), weight.double().mT
    return wide @ wide_weight, x.shape[-1] * SUM_STEP * (wide.abs() @ wide_weight.abs())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> None:
    set_threads(request.param)


def test_the_module_is_built() -> None:
    """A compiler is part of what tests need: without one the package computes with torch, and this file has no use."""
    assert native.IS_BUILT
    assert available(BF16) <= available(FP32)
    assert not available(torch.float16)


@DTYPES
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_linear(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight = random(outputs, inputs, dtype=dtype, seed=1)
    matrix = pack(amid_nan(weight))
    assert (matrix.shape, matrix.dtype) == ((outputs, inputs), dtype)
    for num_rows in (1, 7, 100):
        x = amid_nan(random(num_rows, inputs, dtype=dtype))
        wanted, error = products(x, weight)
        assert_close(linear(x, matrix), wanted, error)
        assert_close(linear(x, matrix, fp32_out=True), wanted, error)
        bias = amid_nan(random(1, outputs, dtype=dtype, seed=2))[0]
        assert_close(linear(x, matrix, bias), wanted + bias.double(), error + (wanted.abs() + 9) * SUM_STEP)


@DTYPES
def test_a_result_is_rounded_once(dtype: torch.dtype) -> None:
    x, matrix = random(9, 300, dtype=dtype), pack(random(70, 300, dtype=dtype, seed=1))
    assert torch.equal(linear(x, matrix), linear(x, matrix, fp32_out=True).to(dtype))


@DTYPES
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_rows_keep_their_bits(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x = random(600, inputs, dtype=dtype)
    matrix = pack(random(outputs, inputs, dtype=dtype, seed=1))
    whole = linear(x, matrix)
    for count in ROW_COUNTS:
        for first in (0, 1, 2, 600 - count):
            part = x[first : first + count]
            for rows in (part, amid_nan(part)):
                assert torch.equal(linear(rows, matrix), whole[first : first + count]), f"{count} rows from {first}"


@DTYPES
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 1024), (72, 72), (20, 320), (300, 4096)])
def test_threads_change_no_bit(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x = random(200, inputs, dtype=dtype)
    matrix = pack(random(outputs, inputs, dtype=dtype, seed=1))
    whole = linear(x, matrix)
    for count in (2, 3):
        set_threads(count)
        for num_rows in (1, 5, 97, 200):
            assert torch.equal(linear(x[:num_rows], matrix), whole[:num_rows])


@DTYPES
def test_only_the_output_is_written(dtype: torch.dtype) -> None:
    x, stack = random(9, 3, 20, dtype=dtype), pack_stack(random(3, 37, 20, dtype=dtype, seed=1))
    wide = torch.full((11, 3, 44), torch.nan, dtype=dtype)
    out = wide[1:-1, :, 4:-3]
    assert head_linear(x, stack, out=out) is out
    assert torch.equal(out, head_linear(x, stack))
    out.fill_(torch.nan)
    assert bool(wide.isnan().all())

    stacks = pack_stack(random(2, 48, 20, dtype=dtype), is_gate_up=True), pack_stack(random(2, 37, 24, dtype=dtype))
    rows, experts = torch.arange(9), torch.arange(9) % 2
    grouped_mlp(x[:, 0], rows, experts, *stacks, out=wide[1:-1, 0, 4:-3])
    assert torch.equal(wide[1:-1, 0, 4:-3], grouped_mlp(x[:, 0], rows, experts, *stacks))
    wide[1:-1, 0, 4:-3] = torch.nan
    assert bool(wide.isnan().all())


@DTYPES
@pytest.mark.usefixtures("threads")
def test_a_matrix_per_head(dtype: torch.dtype) -> None:
    weights = random(5, 70, 33, dtype=dtype, seed=1)
    stack, x = pack_stack(weights), amid_nan(random(40, 5, 33, dtype=dtype))
    assert (stack.shape, len(stack), stack.dtype) == ((5, 70, 33), 5, dtype)
    for num_rows in (1, 40):
        out = head_linear(x[:num_rows], stack)
        for head in range(5):
            assert torch.equal(out[:, head], linear(x[:num_rows, head], pack(weights[head])))


@DTYPES
@pytest.mark.parametrize("shape", [(70, 48), (0, 48), (70, 0)])
def test_no_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_rows, num_pairs = shape
    x, w13, w2 = random(num_rows, 48, dtype=dtype), *experts(dtype, 3, 48, 40)
    assert linear(x[:0], pack(random(7, 48, dtype=dtype))).shape == (0, 7)
    pairs = torch.zeros(num_pairs if num_rows else 0, dtype=torch.int64)
    assert grouped_mlp(x, pairs, pairs, w13, w2).shape == (len(pairs), 48)


def experts(dtype: torch.dtype, count: int, hidden: int, width: int) -> tuple[PackedStack, PackedStack]:
    w13, w2 = expert_weights(dtype, count, hidden, width)
    return pack_stack(w13, is_gate_up=True), pack_stack(w2)


def expert_weights(dtype: torch.dtype, count: int, hidden: int, width: int) -> tuple[Tensor, Tensor]:
    w13 = random(count, 2 * width, hidden, dtype=dtype, seed=1) / 8
    return w13, random(count, hidden, width, dtype=dtype, seed=2) / 8


def mlp(x: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, and what the kernel may be off: fp32 sums, activations rounded to the dtype, fp32 sums again."""
    (gate, up), (gate_error, up_error) = (each.chunk(2, dim=-1) for each in products(x, w13))
    silu = gate * torch.sigmoid(gate)
    activated, wide_w2 = silu * up, w2.double().mT
    step = BF16_STEP if x.dtype == BF16 else 0.0
    error = (1.1 * gate_error * up.abs() + silu.abs() * up_error + activated.abs() * 8 * SUM_STEP) * (1 + step)
    error = error + activated.abs() * step
    sum_error = w2.shape[-1] * SUM_STEP * ((activated.abs() + error) @ wide_w2.abs())
    return activated @ wide_w2, error @ wide_w2.abs() + sum_error


# 24: less than one vector of gate; 40, 33: the last panel is not full; 192: several panels and slabs
@DTYPES
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("hidden", "width"), [(96, 64), (70, 24), (129, 40), (48, 33), (256, 192), (1, 1)])
def test_mlps(hidden: int, width: int, dtype: torch.dtype) -> None:
    weights = expert_weights(dtype, 1, hidden, width)
    x = amid_nan(random(100, hidden, dtype=dtype))
    packed = pack(weights[0][0], is_gate_up=True), pack(weights[1][0])
    wanted, error = mlp(x, weights[0][0], weights[1][0])
    assert_close(swiglu_mlp(x, *packed), wanted, error)
    assert torch.equal(swiglu_mlp(x[7:8], *packed), swiglu_mlp(x, *packed)[7:8])


@pytest.mark.parametrize("dtype", [dtype for dtype in (FP32,) if available(dtype)])
def test_silu_over_its_whole_range(dtype: torch.dtype) -> None:
    values = torch.cat((torch.linspace(-120, 120, 4001), torch.logspace(-30, 1, 999), -torch.logspace(-30, 1, 1000)))
    x = torch.stack((values, torch.ones_like(values)), dim=1).to(dtype)
    out = swiglu_mlp(x, pack(torch.eye(2, dtype=dtype), is_gate_up=True), pack(torch.ones(1, 1, dtype=dtype)))[:, 0]
    wide = values.double()
    wanted = wide * torch.sigmoid(wide)
    assert bool(((out - wanted).abs() <= wanted.abs() * 8 * SUM_STEP + 1e-36).all())
    nan = swiglu_mlp(x * torch.nan, pack(torch.eye(2), is_gate_up=True), pack(torch.ones(1, 1)))
    assert bool(nan.isnan().all())


PairsOf = Callable[[torch.Generator], tuple[Tensor, Tensor]]
MANY = 300
PAIRS: dict[str, PairsOf] = {
    "any": lambda g: (torch.randint(40, (MANY,), generator=g), torch.randint(6, (MANY,), generator=g)),
    "some experts without rows": lambda g: (torch.randint(40, (90,), generator=g), 1 + 2 * (torch.arange(90) % 2)),
    "all of one": lambda g: (torch.randint(40, (MANY,), generator=g), torch.full((MANY,), 4)),
    "one pair": lambda g: (torch.tensor([39]), torch.tensor([5])),
    "a row for each": lambda g: (torch.arange(6), torch.arange(6).flip(0)),
}


@DTYPES
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", PAIRS)
def test_grouped_mlp(name: str, dtype: torch.dtype) -> None:
    rows, expert_of_row = PAIRS[name](torch.Generator().manual_seed(3))
    w13, w2 = expert_weights(dtype, 6, 96, 40)
    packed = pack_stack(list(w13), is_gate_up=True), pack_stack(w2)
    x = amid_nan(random(40, 96, dtype=dtype))
    out = torch.full((len(rows), 96), torch.nan, dtype=dtype)
    grouped_mlp(x, rows, expert_of_row, *packed, out=out)
    for expert in range(6):
        mine = expert_of_row == expert
        wanted, error = mlp(x[rows[mine]], w13[expert], w2[expert])
        assert_close(out[mine], wanted, error)
        alone = swiglu_mlp(x[rows[mine]], pack(w13[expert], is_gate_up=True), pack(w2[expert]))
        assert torch.equal(out[mine], alone), "the same bits as alone"
    part = slice(len(rows) // 3, len(rows) // 3 + 7)
    assert torch.equal(grouped_mlp(x, rows[part], expert_of_row[part], *packed), out[part])


@DTYPES
def test_what_is_wrong_is_refused(dtype: torch.dtype) -> None:
    x, (w13, w2) = random(4, 48, dtype=dtype), experts(dtype, 3, 48, 40)
    good = torch.tensor([0, 1, 2])
    for bad in (torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2])):
        with pytest.raises(IndexError, match=r"an expert not in 0\.\.2"):
            grouped_mlp(x, good, bad, w13, w2)
    with pytest.raises(IndexError, match=r"a row that is not in 0\.\.3"):
        grouped_mlp(x, torch.tensor([0, 4, 2]), good, w13, w2)
    with pytest.raises(AssertionError):
        grouped_mlp(x, good, good, w2, w13)
    with pytest.raises(AssertionError):
        linear(x, pack(random(8, 47, dtype=dtype)))
    with pytest.raises(AssertionError):
        linear(x, pack(random(8, 48, dtype=dtype), is_gate_up=True))
    with pytest.raises(ValueError, match=r"torch\.float16 matrix cannot be packed"):
        pack(x.half())
    with pytest.raises(ValueError, match=r"\[3, 48\] cannot be packed as gate and up"):
        pack(random(3, 48, dtype=dtype), is_gate_up=True)


def count_chunks(chunks: int, times: int) -> list[int]:
    counts = torch.zeros(chunks, dtype=torch.int64)
    _native.count_chunks(counts.data_ptr(), chunks, times)
    return counts.tolist()


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_the_pool_does_every_chunk_once(threads: int) -> None:
    set_threads(threads)
    for chunks in (0, 1, 2, 3, 17, 1000):
        assert count_chunks(chunks, 300) == [300] * chunks


def test_several_callers_at_once() -> None:
    set_threads(3)
    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(count_chunks, [50] * 20, [200] * 20)) == [[200] * 50] * 20


def test_the_pool_wakes_helpers_that_sleep_and_changes_size() -> None:
    for threads in (3, 2, 5, 1, 3):
        before = helper_threads()
        set_threads(threads)
        helpers = helper_threads() - before
        for _ in range(3):
            wait_until_asleep(helpers)
            assert count_chunks(64, 20) == [20] * 64


def test_helpers_keep_off_the_callers_core() -> None:
    """Else, where another process waits for its turn on the other core, they sit behind the caller and never help."""
    set_threads(1)
    cores, before = os.sched_getaffinity(0), helper_threads()
    set_threads(3)
    helpers = [int(thread.name) for thread in helper_threads() - before]
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})
            assert count_chunks(8, 1) == [1] * 8
            assert all(os.sched_getaffinity(helper) == (cores - {core} or cores) for helper in helpers)
    finally:
        os.sched_setaffinity(0, cores)


def helper_threads() -> set[Path]:
    return set(Path("/proc/self/task").iterdir())


def wait_until_asleep(threads: set[Path]) -> None:
    deadline = time.monotonic() + 30
    while any((thread / "stat").read_text().rpartition(")")[2].split()[0] != "S" for thread in threads):
        assert time.monotonic() < deadline, "a helper does not go to sleep"
        os.sched_yield()


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_a_number_of_threads_that_makes_no_sense_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 1024 threads can compute, not {threads}"):
        set_threads(threads)
