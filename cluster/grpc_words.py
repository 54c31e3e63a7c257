"""braid.v1 messages to the front end's words and back. Bad input raises RequestRefused."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping

from google.protobuf.message import DecodeError

from ..model.sampling_params import MAX_SEED, SamplingParams
from ..model.tokenizer import Tokenizer
from . import braid_v1_pb2 as pb
from .request import Delta, GenerateRequest, ModelInfo, Operation, RequestRefused, TokenLogprob

LONG_TEXT = 4096  # characters; encoding more would hold up every stream of this front end
FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}


async def read_request(
    message: bytes,
    tokenizer: Tokenizer,
    info: ModelInfo,
    carrier: Mapping[str, str],
    timeout_s: float | None,
    caller_of: Callable[[str], str] = str,
) -> GenerateRequest:
    """`caller_of` takes the user that the message names."""
    try:
        wire = pb.GenerateRequest.FromString(message)
        if wire.model not in ("", info.name):
            raise RequestRefused("not_found", f"no model {wire.model!r} here: this cluster serves {info.name!r}")
        prompt_ids = await _prompt_ids(wire, tokenizer)
        if wire.sampling.stop and not tokenizer.has_text:
            raise ValueError("stop: the model has no tokenizer, so no text to stop in: use stop_token_ids")
    except (DecodeError, ValueError) as error:
        raise RequestRefused("invalid", str(error)) from error
    params = read_sampling(wire.sampling, max(info.max_model_len - len(prompt_ids), 1))
    operation: Operation = "chat" if wire.WhichOneof("input") == "messages" else "text_completion"
    stop = tuple(wire.sampling.stop)
    return GenerateRequest(
        prompt_ids,
        params,
        stop,
        carrier,
        timeout_s,
        wire.request_id,
        operation,
        wire.priority,
        caller_of(wire.user),
    )


async def _prompt_ids(wire: pb.GenerateRequest, tokenizer: Tokenizer) -> tuple[int, ...]:
    kind = wire.WhichOneof("input")
    if kind == "token_ids":
        return tuple(wire.token_ids.ids)
    if kind == "text":
        text = wire.text
    elif kind == "messages":
        messages = [{"role": message.role, "content": message.content} for message in wire.messages.messages]
        if not messages:
            raise ValueError("messages is empty: send at least one message")
        text = tokenizer.render(messages)
    else:
        raise ValueError("the request has no input: set text, messages or token_ids")
    add_special_tokens = kind == "text"  # a rendered template holds its own
    if len(text) > LONG_TEXT:
        return tuple(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens))
    return tuple(tokenizer.encode(text, add_special_tokens))


def read_sampling(wire: pb.Sampling, room: int) -> SamplingParams:
    """`room`: tokens left in the context, the default of max_tokens."""

    def given(name: str, default: float) -> float:
        return getattr(wire, name) if wire.HasField(name) else default

    return SamplingParams(
        max_tokens=wire.max_tokens if wire.HasField("max_tokens") else room,
        temperature=given("temperature", 1.0),
        top_p=given("top_p", 1.0),
        top_k=wire.top_k,
        min_p=wire.min_p,
        seed=wire.seed if wire.HasField("seed") else secrets.randbelow(MAX_SEED),
        min_tokens=wire.min_tokens,
        ignore_eos=wire.ignore_eos,
        stop_token_ids=tuple(wire.stop_token_ids),
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
        prompt_logprobs=wire.prompt_logprobs if wire.HasField("prompt_logprobs") else None,
    )


def write_delta(delta: Delta) -> pb.GenerateResponse:
    wire = pb.GenerateResponse(
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs or ()),
        prompt_logprobs=_logprobs(delta.prompt_logprobs or ()),
        finish_reason=FINISH_REASONS[delta.finish_reason],
    )
    if isinstance(delta.stop_reason, str):
        wire.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        wire.stop_token_id = delta.stop_reason
    if delta.usage is not None:
        usage = delta.usage
        wire.usage.CopyFrom(pb.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens))
        wire.usage.cached_tokens = usage.cached_tokens
        wire.usage.accepted_prediction_tokens = usage.accepted_prediction_tokens
        wire.usage.rejected_prediction_tokens = usage.rejected_prediction_tokens
    return wire


def write_info(info: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(
        name=info.name,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        architecture=info.architecture,
        notices=info.notices,
    )


def _logprobs(entries: Iterable[TokenLogprob]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
        )
        for entry in entries
    ]
