"""Where the two ends of a pair find each other: a torch store without a socket, whose entries go over their link.

The link has proved who is at its other end; so nobody else can put an entry here, or read one. Each end holds all that
either has set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed

from .links import DialFailed, LinkError
from .messages import pack, unpack

MAX_ENTRIES = 64  # two communicators need an address or an id each
MAX_ENTRY_BYTES = 1 << 16


class PairStore(torch.distributed.Store):  # type: ignore[misc, name-defined]
    """What torch asks of a store to make a communicator of two. Used by any thread.

    `tell` brings an entry to the peer's `hear`. Whoever waits for one waits `timeout_s` at most; raises DialFailed.
    """

    def __init__(self, peer: str, tell: Callable[[bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._peer, self._tell, self._timeout_s = peer, tell, timeout_s
        self._entries: dict[str, bytes] = {}
        self._closed: str | None = None
        self._changed = threading.Condition()

    def hear(self, meta: bytes) -> None:
        """An entry of the peer's. Raises ValueError for what is none, or one too many."""
        try:
            key, value = unpack(meta)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{meta[:32]!r} of {len(meta)} bytes is no entry: {error!r}") from error
        if not isinstance(key, str) or not isinstance(value, bytes) or len(meta) > MAX_ENTRY_BYTES:
            raise ValueError(f"an entry of {len(meta)} bytes: a text and at most {MAX_ENTRY_BYTES} bytes were expected")
        with self._changed:
            if len(self._entries) >= MAX_ENTRIES:
                raise ValueError(f"{self._peer} has sent more than {MAX_ENTRIES} entries")
            self._put(key, value)

    def close(self, reason: str) -> None:
        """Lets go whoever waits, and whoever will."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    # ---- what torch calls

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._put(key, value)
        try:
            self._tell(pack([key, value]))
        except LinkError as error:
            self.close(str(error))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._entries[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._timeout_s if timeout is None else min(timeout.total_seconds(), self._timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.check(keys), timeout_s)
            if not self.check(keys):
                raise DialFailed(f"no pair with {self._peer}: {self._closed or f'silent for {timeout_s:g} s'}")

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._entries for key in keys)

    def clone(self) -> PairStore:
        return self

    def _put(self, key: str, value: bytes) -> None:
        self._entries[key] = value
        self._changed.notify_all()
