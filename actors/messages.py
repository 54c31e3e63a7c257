"""The words spoken over links: kinds, and msgpack bodies for everything but the rows of tensors.

front -> attention:   SUBMIT, CANCEL               attention -> front:   TOKENS, LOAD
prefill -> decode:    KV_OPEN, KV_LAYER, KV_DONE, KV_ABORT               decode -> prefill: KV_ACCEPTED, KV_REFUSED
attention -> expert:  DISPATCH                     expert -> attention:  ROWS, NOT_RESIDENT
attention -> expert:  MAIL_OFFER, MAIL_WAKE        expert -> attention:  MAIL_ACCEPTED, MAIL_REFUSED
attention -> expert:  PAIR_ASK, PAIR_ENTRY, PAIRED_DISPATCH              expert -> attention:  PAIR_ENTRY, PAIRED_ROWS
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Literal

import msgpack


class Kind(IntEnum):
    SUBMIT = 1
    CANCEL = 2
    TOKENS = 3
    LOAD = 4
    KV_OPEN = 10
    KV_LAYER = 11
    KV_DONE = 12
    KV_ABORT = 13
    KV_REFUSED = 14
    KV_ACCEPTED = 15
    DISPATCH = 20
    ROWS = 21
    NOT_RESIDENT = 22
    MAIL_OFFER = 30
    MAIL_ACCEPTED = 31
    MAIL_REFUSED = 32
    MAIL_WAKE = 33
    PAIR_ASK = 40
    PAIR_ENTRY = 41  # what the other end must know to join
    PAIRED_DISPATCH = 42  # as DISPATCH, but the rows of x go through the pair
    PAIRED_ROWS = 43  # as ROWS, but the rows go through the pair


def pack(body: Any) -> bytes:
    return msgpack.packb(body)  # type: ignore[no-any-return]


def unpack(meta: bytes) -> Any:
    return msgpack.unpackb(meta, strict_map_key=False)


ErrorCode = Literal["busy", "unavailable", "deadline", "internal", "invalid"]
Finish = Literal["stop", "length", "error", "cancelled"]
WireLogprob = list[Any]  # [logprob, [[token_id, logprob], ...]]


@dataclass(slots=True)
class Submit:
    """A request as a front end hands it to a prefill worker. `deadline` is Unix time in seconds.

    `priority`: lower is served first. `caller`: who asks; callers of one priority take turns.
    """

    id: str
    prompt: list[int]
    decode: str
    params: dict[str, Any]
    carrier: dict[str, str]
    deadline: float
    front: str
    priority: int = 0
    caller: str = ""

    def pack(self) -> bytes:
        return pack(asdict(self))

    @classmethod
    def unpack(cls, meta: bytes) -> Submit:
        return cls(**unpack(meta))


@dataclass(slots=True)
class TokenItem:
    """Output of one sequence in one step. `index` is the 0-based place of the first token among the generated ones.

    Of the tokens drafted for it so far, `accepted` came true and `rejected` did not. `error`: `code`, `message`, and
    `by`, the worker that has refused it.
    """

    id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[WireLogprob] | None = None
    prompt_logprobs: list[WireLogprob | None] | None = None
    finish: Finish | None = None
    error: dict[str, str] | None = None
    cached: int = 0
    accepted: int = 0
    rejected: int = 0
    timing: dict[str, float] = field(default_factory=dict)

    def wire(self) -> dict[str, Any]:
        """What comes after the tokens is left out where it has its default, as in most: packing is on the path."""
        body = {"id": self.id, "index": self.index, "token_ids": self.token_ids}
        return body | {
            name: value for name in self.__slots__[3:] if (value := getattr(self, name)) not in (None, 0, {})
        }


# layer u16, request number u32 (unique per link), first position u32, number of positions u32, CRC-32 of the rows u32
# (0 where engine.kv_checksums is off)
KV_LAYER = struct.Struct("<HIIII")
# dispatch id u64, map epoch u64, layer u16, phase u8 (0 decode, 1 prefill), dtype u8, rows u32, pairs u32
DISPATCH = struct.Struct("<QQHBBII")
# dispatch id u64, pairs u32, nanoseconds u64 that it waited, that computing took (its whole batch), and until the reply
# filled up so that the rows stand 64 bytes after the beginning of the frame: on such a boundary, in an empty ring
ROWS = struct.Struct("<QIQQQ10x")
