"""What a request asks of the sampler, checked at the edge. Imports no torch, so that a front end can use it cheaply."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

MAX_LOGPROBS = 20
MAX_STOP_IDS = 1024  # they are looked at for every token
MAX_ID = 2**31 - 1
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`top_k` 0 is off; `logprobs` n asks for the sampled token's log-probability and the n largest ones."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def check(self) -> None:
        """Raises ValueError naming the field, its value and what would be accepted."""
        self._check_types()
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "use 1 or more")
        _require(
            self.max_tokens > 0 or self.prompt_logprobs is not None,
            "max_tokens",
            self.max_tokens,
            "use 1 or more, or ask for log-probabilities of the prompt (echo)",
        )
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "use 0 (greedy) or a positive number",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "use a number in (0, 1]; 1 is off")
        _require(0 <= self.top_k <= MAX_ID, "top_k", self.top_k, f"use 1 to {MAX_ID}; 0 is off")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "use a number in [0, 1]; 0 is off")
        _require(MIN_SEED <= self.seed <= MAX_SEED, "seed", self.seed, "use a 64-bit signed integer")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"use 0 to max_tokens ({self.max_tokens})",
        )
        _require(
            len(self.stop_token_ids) <= MAX_STOP_IDS,
            "stop_token_ids",
            f"{len(self.stop_token_ids)} ids",
            f"use at most {MAX_STOP_IDS}",
        )
        for token in self.stop_token_ids:
            _require(0 <= token <= MAX_ID, "stop_token_ids", token, f"use ids from 0 to {MAX_ID}")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _require(count is None or 0 <= count <= MAX_LOGPROBS, name, count, f"use 0 to {MAX_LOGPROBS}")

    def _check_types(self) -> None:
        integers: list[tuple[str, Any]] = [
            (name, getattr(self, name)) for name in ("max_tokens", "top_k", "seed", "min_tokens")
        ]
        integers += [
            (name, value) for name in ("logprobs", "prompt_logprobs") if (value := getattr(self, name)) is not None
        ]
        integers += [("stop_token_ids", token) for token in self.stop_token_ids]
        for name, value in integers:
            _require(isinstance(value, int) and not isinstance(value, bool), name, value, "use an integer")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, value, "use a number")

    def stop_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end the sequence: the model's end tokens (unless ignored) and the request's own."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))

    def banned_ids(self, num_generated: int, eos_token_ids: Collection[int]) -> tuple[int, ...]:
        """The tokens that may not be sampled next: none that ends the sequence before `min_tokens` are out."""
        return tuple(sorted(self.stop_ids(eos_token_ids))) if num_generated < self.min_tokens else ()

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> SamplingParams:
        unknown = set(wire) - {field.name for field in fields(cls)}
        if unknown or "max_tokens" not in wire:
            raise ValueError(f"sampling parameters {sorted(wire)}: unknown {sorted(unknown)} or no max_tokens")
        return cls(**{**wire, "stop_token_ids": tuple(wire.get("stop_token_ids", ()))})


def _require(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}: {remedy}")
