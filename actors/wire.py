"""Tensors as bytes and back, without a copy where the layout allows it."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; the view keeps the tensor alive."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def rows_from(payload: memoryview, dtype: torch.dtype, width: int) -> Tensor:
    """[rows, width] over the payload's own memory."""
    if not payload.nbytes:
        return torch.empty(0, width, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype).view(-1, width)
