"""One request inside an attention worker: its tokens, its blocks and where it stands."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from ..model.kv_cache import BLOCK_SIZE
from ..model.sampler import SampledToken
from ..model.sampling_params import SamplingParams
from .drafting import Drafting
from .messages import Submit, WireLogprob

# waiting: in the prefill queue | prefill: owns blocks, prompt partly computed | handover: prompt done, first token
# held back until the decode worker has accepted | receiving: blocks reserved, latent rows arriving | decode: running
State = Literal["waiting", "prefill", "handover", "receiving", "decode", "finished"]


@dataclass(eq=False, slots=True)
class Sequence:
    """`tokens` = prompt + generated; positions below `num_computed` have their latent rows in the cache.

    `drafts` are guesses at the tokens after the last one, to be verified by the next step. `order` is that of arrival
    at this worker; `cached_tokens` of the prompt were here when it began. `kv_have` leading rows are at the decode
    worker without our sending them; `kv_sent` are the positions that have been sent to it, or wait for room on the way.
    `kv_missing` has for each layer a bit for every position whose rows are to come from the prefill worker.
    """

    id: str
    front: str
    target: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    carrier: dict[str, str]
    deadline: float
    state: State = "waiting"
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    drafts: list[int] = field(default_factory=list)
    drafting: Drafting | None = None
    priority: int = 0
    caller: str = ""
    order: int = 0
    prefix_keys: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    accepted: bool = False
    number: int = 0
    source: str = ""
    kv_missing: list[int] = field(default_factory=list)
    prompt_logprobs: list[WireLogprob | None] = field(default_factory=list)
    first_token: SampledToken | None = None
    arrived_ns: int = field(default_factory=time.time_ns)
    started_ns: int = 0
    kv_have: int = 0
    kv_sent: tuple[int, int] | None = None
    kv_started_ns: int = 0
    kv_send_ns: int = 0
    kv_bytes: int = 0

    @classmethod
    def from_submit(cls, submit: Submit) -> Sequence:
        return cls(
            submit.id,
            submit.front,
            submit.decode,
            list(submit.prompt),
            len(submit.prompt),
            SamplingParams.from_wire(submit.params),
            submit.carrier,
            submit.deadline,
            priority=submit.priority,
            caller=submit.caller,
        )

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def max_length(self) -> int:
        """Positions that may ever be written: the last generated token never enters the cache."""
        return self.num_prompt + max(self.params.max_tokens - 1, 0)

    @property
    def rank(self) -> tuple[int, int]:
        """Small for what comes first: it is given blocks before others, and preempted after them."""
        return self.priority, self.order

    @property
    def urgency(self) -> tuple[int, int, int]:
        """Small for the prompt that is given rows first."""
        return self.priority, self.num_left, self.order

    @property
    def num_left(self) -> int:
        """Prompt rows to be computed, as far as is known: of one that waits, some may be cached."""
        return self.num_prompt - self.num_computed

    def reaches(self, num_positions: int) -> bool:
        """Whether its blocks have room for so many."""
        return len(self.block_table) * BLOCK_SIZE >= num_positions

    def banned_ids(self, ahead: int, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """What the token `ahead` places after the next one must not be."""
        params = self.params
        return params.banned_ids(self.num_generated + ahead, eos_token_ids) if params.min_tokens else ()

    def finish_reason(self, eos_token_ids: tuple[int, ...]) -> Literal["stop", "length"] | None:
        """Why the newest token ends the sequence; None if it does not."""
        if self.num_generated and self.tokens[-1] in self.params.stop_ids(eos_token_ids):
            return "stop"
        return "length" if self.num_generated >= self.params.max_tokens else None
