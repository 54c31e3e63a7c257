"""Request placement: which prefill worker computes a prompt and which decode worker generates from it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeCandidate:
    """`free_blocks` is what a new sequence may count on; it can be negative while reports lag behind reservations."""

    name: str
    free_blocks: int
    running: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    prefill: str
    decode: str


def blocks_needed(num_prompt: int, max_tokens: int, block_size: int) -> int:
    """Blocks a sequence may come to fill. The last generated token never enters the cache."""
    return -(-(num_prompt + max(max_tokens - 1, 0)) // block_size)


def place(queues: Mapping[str, int], decode: Iterable[DecodeCandidate], num_blocks: int) -> Placement | None:
    """The decode worker with the most free blocks and the prefill worker with the shortest queue; None = no room now.

    `queues`: queued prompt tokens by prefill worker. 0 blocks: the prompt's worker samples the only token as well.
    When the chosen decode worker also computes prompts, it computes this one: the KV cache then never travels.
    """
    if queues and not num_blocks:
        return Placement(shortest_queue(queues), shortest_queue(queues))
    roomy = [candidate for candidate in decode if candidate.free_blocks >= num_blocks]
    if not queues or not roomy:
        return None
    target = min(roomy, key=lambda c: (-c.free_blocks, queues.get(c.name, 0), c.running, c.name)).name
    return Placement(target if target in queues else shortest_queue(queues), target)


def shortest_queue(queues: Mapping[str, int]) -> str:
    return min(queues, key=lambda name: (queues[name], name))


@dataclass(slots=True)
class DecodeLedger:
    """What this front end has reserved on one decode worker, beside what the worker reports.

    A report lags: a reservation counts as `unseen` until the worker shows, with a token of that sequence, that its
    own free count includes it. `reserved` bounds the sum even when every report lags.
    """

    total_blocks: int = 0
    reported_free: int = 0
    reserved: int = 0
    unseen: int = 0

    @property
    def free_blocks(self) -> int:
        return min(self.reported_free - self.unseen, self.total_blocks - self.reserved)

    def reserve(self, num_blocks: int) -> None:
        self.reserved += num_blocks
        self.unseen += num_blocks

    def see(self, num_blocks: int) -> None:
        self.unseen -= num_blocks
        assert self.unseen >= 0, f"{-self.unseen} more blocks seen than reserved"

    def release(self, num_blocks: int, was_seen: bool) -> None:
        self.reserved -= num_blocks
        self.unseen -= 0 if was_seen else num_blocks
        assert self.reserved >= 0, f"{-self.reserved} more blocks released than reserved"
        assert self.unseen >= 0, f"{-self.unseen} more unseen blocks released than reserved"
