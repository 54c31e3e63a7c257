"""Turns a body into the sequences it asks for: tokens, sampling parameters and one seed for each choice."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..model.sampling_params import MAX_SEED, MIN_SEED, SamplingParams
from ..model.tokenizer import Tokenizer
from .http_answer import Exchange
from .http_errors import ApiError
from .http_schema import Body, ChatBody, CompletionBody
from .http_shapes import ChatShape, CompletionShape, Prompt, Shape, Wishes
from .request import GenerateRequest, ModelInfo

DEFAULT_MAX_TOKENS = 16  # of completions, as with OpenAI; a chat answer may fill the context

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """What an HTTP request brings beside its body. `caller_of` takes the body's user."""

    id: str
    created: int
    carrier: Mapping[str, str]
    caller_of: Callable[[str], str] = str


def understand(body: CompletionBody | ChatBody, tokenizer: Tokenizer, info: ModelInfo, call: Call) -> Exchange:
    """Everything that can be wrong with a request is found here, before its first token."""
    if body.model not in (None, info.name):
        known = f"the model {body.model!r:.120} does not exist: this server has {info.name!r}"
        raise ApiError(known, "model", status=404, code="model_not_found")
    if body.stops and not tokenizer.has_text:
        raise ApiError("stop: the model has no tokenizer, so no text to stop in: use stop_token_ids", "stop")
    if isinstance(body, ChatBody):
        return _chat(body, tokenizer, info, call)
    return _completion(body, tokenizer, info, call)


def _completion(body: CompletionBody, tokenizer: Tokenizer, info: ModelInfo, call: Call) -> Exchange:
    echo = bool(body.echo)
    if body.max_tokens == 0 and not echo:
        raise ApiError("max_tokens is 0: use 1 or more, or set echo to score the prompt", "max_tokens")
    add_special = body.add_special_tokens is not False
    prompts = [
        _text_prompt(given, tokenizer, add_special, "prompt")
        if isinstance(given, str)
        else _id_prompt(given, tokenizer, info)
        for given in body.prompts()
    ]
    scored = body.logprobs if body.logprobs is not None or body.max_tokens else 0
    lengths = [_max_tokens("max_tokens", body.max_tokens, DEFAULT_MAX_TOKENS, prompt, info) for prompt in prompts]
    settings = [_params(body, max_tokens, body.logprobs, scored if echo else None) for max_tokens in lengths]
    wishes = Wishes(body.logprobs, echo, bool(body.return_token_ids), bool(body.return_tokens_as_token_ids))
    shape = CompletionShape(tokenizer, prompts, body.n or 1, wishes)
    return _exchange(body, info, call, shape, prompts, settings)


def _chat(body: ChatBody, tokenizer: Tokenizer, info: ModelInfo, call: Call) -> Exchange:
    messages, num_top = body.plain_messages(), body.num_top()
    try:
        text = tokenizer.render(messages, body.add_generation_prompt is not False, body.chat_template_kwargs)
    except ValueError as error:
        raise ApiError(str(error), "messages") from error
    prompt = _text_prompt(text, tokenizer, bool(body.add_special_tokens), "messages")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = getattr(body, name)
    if asked is not None and asked < 1:
        raise ApiError(f"{name} is {asked}: use 1 or more", name)
    settings = _params(body, _max_tokens(name, asked, info.max_model_len, prompt, info), num_top, None)
    wishes = Wishes(num_top, False, bool(body.return_token_ids), bool(body.return_tokens_as_token_ids))
    shape = ChatShape(tokenizer, prompt, body.n or 1, wishes)
    return _exchange(body, info, call, shape, [prompt], [settings])


def _text_prompt(text: str, tokenizer: Tokenizer, add_special_tokens: bool, param: str) -> Prompt:
    try:
        ids = tokenizer.encode(text, add_special_tokens)
    except ValueError as error:
        raise ApiError(f"{param}: {error}", param) from error
    if not ids:
        raise ApiError(f"{param} is empty: it has no tokens", param)
    is_bos_hidden = ids[0] == tokenizer.bos_id and not text.startswith(tokenizer.bos_token or "\0")
    return Prompt(text, tuple(ids), int(is_bos_hidden))


def _id_prompt(ids: list[int], tokenizer: Tokenizer, info: ModelInfo) -> Prompt:
    wrong = next((token for token in ids if not 0 <= token < info.vocab_size), None)
    if wrong is not None:
        raise ApiError(f"prompt holds token id {wrong}: use 0 to {info.vocab_size - 1}", "prompt")
    num_hidden = int(ids[0] == tokenizer.bos_id)
    return Prompt(tokenizer.decode(ids[num_hidden:], skip_special_tokens=False), tuple(ids), num_hidden)


def _params(body: Body, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=0 if body.top_k == -1 else _or(body.top_k, 0),  # vLLM's other spelling of "off"
        min_p=_or(body.min_p, 0.0),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        min_tokens=_or(body.min_tokens, 0),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    try:
        params.check()
    except ValueError as error:
        raise ApiError(str(error), str(error).split(" ", 1)[0]) from error
    return params


def _max_tokens(name: str, asked: int | None, default: int, prompt: Prompt, info: ModelInfo) -> int:
    """Names the figures when they do not fit; a default gives way instead. `name`: the field that was asked by."""
    num_prompt, context = len(prompt.ids), info.max_model_len
    room = context - num_prompt
    wanted = min(default, room) if asked is None else asked
    if wanted <= room and (asked is not None or room > 0):
        return wanted
    param = name if asked is not None and room >= 0 else "prompt"
    fault = f"the prompt has {num_prompt} tokens"
    fault += f" and {name} is {wanted}: use at most {room}" if param == name else ": shorten it"
    message = f"this model's context is {context} tokens, but {fault}"
    raise ApiError(message, param, code="context_length_exceeded")


def _exchange(
    body: Body,
    info: ModelInfo,
    call: Call,
    shape: Shape,
    prompts: Sequence[Prompt],
    settings: Sequence[SamplingParams],
) -> Exchange:
    n = body.n or 1
    caller = call.caller_of(body.user or "")
    requests = [
        GenerateRequest(
            prompt.ids,
            replace(params, seed=_nth_seed(params.seed, choice)),
            body.stops,
            call.carrier,
            request_id=f"{shape.id_prefix}{call.id}-{place * n + choice}",
            priority=body.priority or 0,
            caller=caller,
        )
        for place, (prompt, params) in enumerate(zip(prompts, settings, strict=True))
        for choice in range(n)
    ]
    options = body.stream_options
    include_usage = options is not None and bool(options.include_usage)
    return Exchange(shape.id_prefix + call.id, call.created, info.name, requests, n, shape, include_usage)


def _nth_seed(seed: int, choice: int) -> int:
    """Choice i of a prompt is what the same request with seed + i and n 1 gives; wraps round like a 64-bit integer."""
    return (seed + choice - MIN_SEED) % (MAX_SEED - MIN_SEED + 1) + MIN_SEED


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
