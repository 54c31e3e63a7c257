"""Memory for rows on their way between experts and combine: taken, filled, sent or read, and used again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .wire import bytes_of


@dataclass(frozen=True, slots=True)
class RowBuffer:
    """rows: [capacity, width]; bytes: the same memory."""

    rows: Tensor
    bytes: memoryview

    def bytes_of_rows(self, first: int, num: int) -> memoryview:
        row_bytes = self.rows.shape[1] * self.rows.itemsize
        return self.bytes[first * row_bytes : (first + num) * row_bytes]


class RowBuffers:
    """Keeps no more buffers than have been taken at once."""

    def __init__(self) -> None:
        self._free: list[RowBuffer] = []

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> RowBuffer:
        for index, buffer in enumerate(self._free):
            rows = buffer.rows
            if rows.shape[0] >= num_rows and rows.shape[1] == width and rows.dtype == dtype:
                return self._free.pop(index)
        if self._free:
            self._free.pop()  # what did not fit now would seldom fit again
        rows = torch.empty(num_rows, width, dtype=dtype)
        return RowBuffer(rows, bytes_of(rows))

    def give_back(self, buffer: RowBuffer) -> None:
        self._free.append(buffer)
