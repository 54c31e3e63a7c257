"""Notes native kernel calls, to make them again without Python in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .native import IS_BUILT

if IS_BUILT or TYPE_CHECKING:
    from . import _native


def noted(work: Callable[[], object]) -> Callable[[], None]:
    """Runs the work. Returns what makes its kernel calls again, in order, over the same addresses.

    The caller sees to it that the memory of all tensors involved outlives the result.
    """
    _native.start_tape()
    try:
        work()
    finally:
        tape = _native.end_tape()
    return partial(_native.play, tape)
