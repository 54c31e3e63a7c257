"""The (row, expert) pairs of a dispatch: who gets which, how they are laid out, and how they are read.

A payload is int32 rows [pairs], int32 experts [pairs], then the rows of x that the pairs need, each once. Natively each
function is one call of a microsecond; the numpy forms below define them, and run where there was no compiler.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .shm_pipe import HAS_NATIVE
from .wire import bytes_of, rows_from

if HAS_NATIVE:
    from . import _native

Ints = npt.NDArray[np.int64]


def split(experts: Ints, slots: Ints, owner_of: Ints, num_owners: int) -> tuple[Ints, tuple[int, ...]]:
    """slots: places in `experts`. The slots grouped by owner (-1 first), in their order; how many each owner has."""
    if HAS_NATIVE:
        order = np.empty_like(slots)
        return order, _native.split(experts, slots, owner_of, num_owners, order)
    owners = owner_of[experts[slots]]
    order = slots[np.argsort(owners, kind="stable")]
    return order, tuple(np.bincount(owners + 1, minlength=num_owners + 1).tolist())


def encode(x: Tensor, experts: Ints, slots: Ints, top_k: int, out: npt.NDArray[np.uint8]) -> int:
    """x: [M, hidden], contiguous; slots (row * top_k + slot) ascending. Writes the payload; returns its rows of x."""
    row_bytes = x.shape[1] * x.itemsize
    if HAS_NATIVE:
        return _native.encode(x.data_ptr(), row_bytes, experts, slots, top_k, out)
    needed, pairs = encode_pairs(experts, slots, top_k)
    rows = x.view(torch.uint8).numpy()[needed].reshape(-1)
    out[: len(pairs)], out[len(pairs) : len(pairs) + len(rows)] = np.frombuffer(pairs, np.uint8), rows
    return len(needed)


def encode_pairs(experts: Ints, slots: Ints, top_k: int) -> tuple[Ints, memoryview]:
    """The rows of x that the slots need, ascending, and a payload's pairs, for rows that go another way."""
    needed, row_of_pair = np.unique(slots // top_k, return_inverse=True)
    return needed, np.concatenate([row_of_pair, experts[slots]]).astype(np.int32).data.cast("B")


def are_within(payload: memoryview, num_pairs: int, num_rows: int, num_experts: int) -> bool:
    """Whether the pairs name only rows and experts that there are. Raises ValueError if the payload is too short."""
    if HAS_NATIVE:
        return _native.check(payload, num_pairs, num_rows, num_experts)
    rows, experts = np.frombuffer(payload, dtype=np.uint32, count=2 * num_pairs).reshape(2, num_pairs)
    return bool((rows < num_rows).all() and (experts < num_experts).all())


def decode(payload: memoryview, num_pairs: int, first_row: int, local: Ints, rows: Ints, places: Ints) -> bool:
    """Fills `rows` (from `first_row` on) and `places`: local[expert]. False if an expert has none (-1)."""
    if HAS_NATIVE:
        return _native.decode(payload, num_pairs, first_row, local, rows, places)
    pairs = np.frombuffer(payload, dtype=np.int32, count=2 * num_pairs).reshape(2, num_pairs)
    rows[:], places[:] = pairs[0] + first_row, local[pairs[1]]
    return bool((places >= 0).all())


def scatter(payload: memoryview, slots: Ints, rows: Tensor) -> None:
    """payload: one row for each slot; puts them into their places of rows [places, hidden]."""
    if HAS_NATIVE:
        _native.scatter(payload, rows.shape[1] * rows.itemsize, slots, bytes_of(rows))
    else:
        rows[torch.from_numpy(slots)] = rows_from(payload, rows.dtype, rows.shape[1])


def experts_of(payload: memoryview, num_pairs: int) -> Ints:
    """[pairs]: the logical expert of each."""
    return np.frombuffer(payload, dtype=np.int32, count=2 * num_pairs)[num_pairs:].astype(np.int64)


def x_of(payload: memoryview, num_pairs: int, dtype: torch.dtype, hidden: int) -> Tensor:
    """[rows, hidden] over the payload's own memory."""
    return rows_from(payload[8 * num_pairs :], dtype, hidden)
