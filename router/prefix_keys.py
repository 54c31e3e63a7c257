"""Names the full blocks of a prompt by what they hold and all that comes before, so that equal prefixes meet."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

KEY_BYTES = 16  # two prompts in 2**64 would share a name by chance


def prefix_keys(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """One key for each full block of `block_size` tokens (ids from 0 to 2**32 - 1).

    A key is a hash of the key before it and the block's tokens: equal keys mean equal prompts up to the block's end.
    """
    keys: list[bytes] = []
    block = struct.Struct(f"<{block_size}I")
    parent = bytes(KEY_BYTES)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        packed = block.pack(*tokens[start : start + block_size])
        parent = hashlib.blake2b(parent + packed, digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys
