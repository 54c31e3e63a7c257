"""API keys, and who asks, as far as turns at the queue go: one key of several, else the user that the request names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

MAX_USER = 64  # characters that tell users apart


def api_keys_in(text: str) -> tuple[str, ...]:
    """One key a line; blank lines and lines that begin with # are no keys."""
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def caller_of(authorization: str, api_keys: Collection[str], user: str) -> str:
    """`authorization`: the header or metadata of a request that has been let in.

    Holders of different keys do not trust each other, and nobody can invent a key, as one can invent a user. Who shares
    the only key, or needs none, is told apart by `user`. The key itself goes no further than this.
    """
    if len(api_keys) < 2:
        return user[:MAX_USER]
    key = authorization.partition(" ")[2].strip()
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
