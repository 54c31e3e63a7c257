"""Request placement: which prefill worker computes a prompt and which decode worker generates from it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

RUNNING_TOKENS = 64  # what a running sequence still takes from a prompt that is computed beside it, in prompt tokens


@dataclass(frozen=True, slots=True)
class PrefillCandidate:
    """`queued_tokens`: what it has to compute before; `cached_tokens`: what of the new prompt it is likely to hold."""

    name: str
    queued_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DecodeCandidate:
    """`free_blocks` is what a new sequence may count on; it can be negative while reports lag behind reservations.

    `cached_blocks` of the new prompt it is likely to hold: they need not travel.
    """

    name: str
    free_blocks: int
    running: int = 0
    cached_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    prefill: str
    decode: str


def blocks_at_first(num_prompt: int, max_tokens: int, block_size: int) -> int:
    """Blocks a sequence needs to begin with; it takes more as it grows, or is preempted where there are none."""
    return -(-min(num_prompt + 1, num_prompt + max(max_tokens - 1, 0)) // block_size)


def place(
    prefill: Iterable[PrefillCandidate], decode: Iterable[DecodeCandidate], num_prompt: int, num_blocks: int
) -> Placement | None:
    """Where a prompt of `num_prompt` tokens goes that needs `num_blocks` to begin decoding; None: no room now.

    The prompt goes where its first token comes soonest: least work queued and left of the prompt itself, so that a
    cached prefix counts as much as the queue it is worth. The decode worker is the one with the most room; what it
    holds of the prompt counts as room, and every sequence that runs there keeps a block to grow into. 0 blocks: the
    prompt's worker samples the only token as well. A worker of both roles decodes what it computes: the KV cache never
    travels.
    """
    works = {one.name: one.queued_tokens + num_prompt - one.cached_tokens for one in prefill}
    if works and not num_blocks:
        return Placement(least(works), least(works))
    roomy = [one for one in decode if one.free_blocks - one.running >= num_blocks]
    if not works or not roomy:
        return None

    def cost(one: DecodeCandidate) -> tuple[int, int, int, str]:
        work = works[one.name] + RUNNING_TOKENS * one.running if one.name in works else 0
        return work, -(one.free_blocks + one.cached_blocks), one.running, one.name

    target = min(roomy, key=cost).name
    return Placement(target if target in works else least(works), target)


def least(works: dict[str, int]) -> str:
    return min(works, key=lambda name: (works[name], name))


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
