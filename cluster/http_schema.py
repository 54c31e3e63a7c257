"""What POST bodies may hold: OpenAI's fields and vLLM's extensions; known fields that would do nothing are refused."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..model.sampling_params import MAX_LOGPROBS
from .http_errors import ApiError, schema_error
from .request import MAX_STOPS

MAX_CHOICES = 2048  # prompts times n, of one request

# Fields that other servers know and this one does not, with the values that ask for nothing. Other values are refused:
# to ignore them would change what the caller gets. Fields nobody knows are ignored, as clients expect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logits_processors": (None, []),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "continue_final_message": (None, False),
    "chat_template": (None,),
    "kv_transfer_params": (None,),
    "documents": (None, []),
    # of the other endpoint
    "echo": (None, False),
    "max_completion_tokens": (None,),
    "top_logprobs": (None,),
}
_INSTEAD = {
    "best_of": "use n",
    "prompt_logprobs": "use echo with logprobs",
    "max_completion_tokens": "use max_tokens",
    "top_logprobs": "set logprobs to their number",
    "chat_template": "the checkpoint's own is used; chat_template_kwargs sets its switches",
}

log = logging.getLogger(__name__)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Body(BaseModel):
    """Fields of both endpoints. null means the default, as with OpenAI."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    best_of: int | None = None
    # vLLM's extensions
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise ApiError(f"stop has {len(stops)} strings: use at most {MAX_STOPS}", "stop")
        if "" in stops:
            raise ApiError("stop holds an empty string: leave it out", "stop")
        return tuple(stops)

    def check(self) -> None:
        """What no single field shows."""
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise ApiError(f"n is {self.n}: use 1 to {MAX_CHOICES}", "n")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is set without stream: set stream to true", "stream_options")
        if self.best_of not in (None, self.n or 1):
            raise ApiError(f"best_of is not supported: {_INSTEAD['best_of']}", "best_of")
        extra = self.model_extra or {}
        for name, idle in UNSUPPORTED.items():
            if extra.get(name) not in idle:
                raise ApiError(f"{name} is not supported: {_INSTEAD.get(name, 'leave it out')}", name)
        if unknown := sorted(set(extra) - set(UNSUPPORTED)):
            log.debug("ignored unknown fields %.200r", unknown)


class CompletionBody(Body):
    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """A string, strings, token ids, or lists of token ids -> a list of prompts."""
        given = self.prompt
        if isinstance(given, str) or (isinstance(given, list) and given and _is_id(given[0])):
            given = [given]
        if not isinstance(given, list) or not given:
            raise ApiError("prompt must be a string, token ids, or a list of these that is not empty", "prompt")
        prompts = [_prompt(prompt, place) for place, prompt in enumerate(given)]
        if len(prompts) * (self.n or 1) > MAX_CHOICES:
            raise ApiError(f"{len(prompts)} prompts times n {self.n or 1}: at most {MAX_CHOICES} in all", "prompt")
        return prompts


class ChatBody(Body):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def plain_messages(self) -> list[dict[str, Any]]:
        """Messages with their text parts put together, one a line: templates expect one string."""
        if not self.messages:
            raise ApiError("messages is empty: send at least one message", "messages")
        return [_plain(message, f"messages.{place}") for place, message in enumerate(self.messages)]

    def num_top(self) -> int | None:
        """How many alternatives to give for each token; None = no log-probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs is set without logprobs: set logprobs to true", "top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise ApiError(f"top_logprobs is {self.top_logprobs}: use 0 to {MAX_LOGPROBS}", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


AnyBody = TypeVar("AnyBody", CompletionBody, ChatBody)


def parse(kind: type[AnyBody], raw: bytes) -> AnyBody:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        message = f"the body is not valid UTF-8: byte {raw[error.start]:#04x} at offset {error.start}"
        raise ApiError(message, code="invalid_utf8") from error
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise schema_error(error) from error
    body.check()
    return body


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(given: Any, place: int) -> str | list[int]:
    if isinstance(given, str) or (isinstance(given, list) and all(_is_id(token) for token in given)):
        if not given:
            raise ApiError(f"prompt {place} is empty: send at least one token of text", "prompt")
        return given
    raise ApiError(f"prompt {place} is neither a string nor a list of token ids", "prompt")


def _plain(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise ApiError(f"{where}.role is {message.get('role')!r:.80}: use a string such as 'user'", f"{where}.role")
    if message["role"] == "developer":  # OpenAI's newer word for it; templates know the older one and drop others
        message = {**message, "role": "system"}
    content = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] == "assistant"):
        return message
    if not isinstance(content, list) or not content:
        raise ApiError(f"{where}.content must be a string or a list of text parts", f"{where}.content")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ApiError(
                f"{where}.content has a part that is not text: this model reads text only", f"{where}.content"
            )
    return {**message, "content": "\n".join(part["text"] for part in content)}
