"""A dispatch as a message: what goes to an expert worker without a ring, or whose ring has no room now."""

from __future__ import annotations

import numpy as np

from .hops import RemoteHandle
from .messages import DISPATCH
from .pairs import Ints, encode
from .wire import DTYPE_CODES


class DispatchMessages:
    """Writes one at a time: its memory is free again when `Link.send` returns."""

    def __init__(self) -> None:
        self._payload = np.zeros(0, dtype=np.uint8)
        self._bytes = self._payload.data

    def write(self, handle: RemoteHandle, slots: Ints, number: int, epoch: int, phase: int) -> tuple[bytes, memoryview]:
        """Meta and payload of the handle's slots, ascending flat places (row * k + slot)."""
        x, num_pairs = handle.host_x(), len(slots)
        self._make_room(8 * num_pairs + x.nbytes)
        num_rows = encode(x, handle.experts, slots, handle.top_k, self._payload)
        meta = DISPATCH.pack(number, epoch, handle.layer, phase, DTYPE_CODES[x.dtype], num_rows, num_pairs)
        return meta, self._bytes[: 8 * num_pairs + num_rows * handle.row_bytes]

    def _make_room(self, num_bytes: int) -> None:
        if len(self._payload) < num_bytes:
            self._payload = np.empty(num_bytes, dtype=np.uint8)
            self._bytes = self._payload.data
