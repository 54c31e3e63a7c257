"""What a front end is asked and what it answers: the words that HTTP, gRPC and the front end core share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..model.sampling_params import SamplingParams

# invalid: the caller must change it | busy: later, elsewhere | unavailable: a worker died or none is there
RefusalCode = Literal["invalid", "busy", "unavailable", "deadline", "not_found", "internal"]

Operation = Literal["text_completion", "chat"]

MAX_STOPS = 16  # every token's text is held against each of them
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


class RequestRefused(Exception):
    """Ends a request with an answer, before its first delta or, when a worker dies, in the midst of the stream."""

    def __init__(self, code: RefusalCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code: RefusalCode = code
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`carrier` holds the caller's W3C trace headers; `request_id` is the caller's name for it, in traces only.

    `priority`: lower is served first. Callers of one priority take turns, and `caller` tells them apart.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    carrier: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None  # None = the front end's own limit, which also caps it
    request_id: str = ""
    operation: Operation = "text_completion"  # in traces only
    priority: int = 0
    caller: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`logprob` is None only for the first token of a prompt. `top` holds (token id, logprob), the likeliest first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_prediction_tokens: int = 0  # of the completion tokens: drafted, and then found to be right
    rejected_prediction_tokens: int = 0  # drafted in vain: in no answer, but somebody's time

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of output. `text` may lag behind `token_ids`: half characters and possible stop strings are held back.

    Only the last delta has a finish reason and the usage; `stop_reason` is the stop string or stop token id that ended
    it, None for an end-of-sequence token. `prompt_logprobs` comes with the first delta.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class FrontEndSettings:
    """What a front end is told once. `name` must be unique in the cluster: it prefixes every internal request id."""

    name: str
    secret: bytes
    model_name: str
    vocab_size: int
    max_model_len: int
    incarnation: int = 0
    max_waiting: int = 256
    request_timeout_s: float = 600.0
    link_timeout_s: float = 5.0
    host_id: str | None = None  # None = found out by the process the front end runs in

    def __repr__(self) -> str:  # the secret stays out of logs
        return f"FrontEndSettings({self.name}#{self.incarnation}, model={self.model_name})"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What clients may know about the model. `notices` carries the use restrictions a checkpoint ships with."""

    name: str
    max_model_len: int
    vocab_size: int
    architecture: str = ""
    created: int = 0
    notices: tuple[str, ...] = ()


def check_request(request: GenerateRequest, settings: FrontEndSettings) -> None:
    """Raises ValueError saying what to change."""
    params, num_prompt = request.params, len(request.prompt_ids)
    params.check()
    if not num_prompt:
        raise ValueError("the prompt is empty: send at least one token")
    if num_prompt > settings.max_model_len - bool(params.max_tokens):
        raise ValueError(
            f"the prompt has {num_prompt} tokens and the context is {settings.max_model_len}: shorten the prompt"
        )
    if num_prompt + params.max_tokens > settings.max_model_len:
        raise ValueError(
            f"a prompt of {num_prompt} tokens and max_tokens {params.max_tokens} exceed the context of "
            f"{settings.max_model_len} tokens: shorten the prompt or lower max_tokens"
        )
    for token_id in request.prompt_ids:
        if not 0 <= token_id < settings.vocab_size:
            raise ValueError(f"token id {token_id} in the prompt: use 0 to {settings.vocab_size - 1}")
    if not MIN_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise ValueError(f"priority is {request.priority}: use {MIN_PRIORITY} to {MAX_PRIORITY}, lower is sooner")
    if len(request.stop) > MAX_STOPS:
        raise ValueError(f"stop has {len(request.stop)} strings: use at most {MAX_STOPS}")
    if "" in request.stop:
        raise ValueError("stop contains an empty string: leave it out")
