"""Every kernel here runs in Triton's interpreter: no GPU is needed, and none would be used."""

from collections.abc import Iterator

import pytest
import torch
import triton_interpreter

triton_interpreter.repair()


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What torch.empty returns is full of NaN, or of the largest whole number: nobody reads what nobody wrote."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
