"""What a worker tells of one sequence: its tokens to the front end, its phases to whoever collects traces."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..model.sampler import SampledToken
from .messages import Finish, TokenItem, WireLogprob
from .sequence import Sequence
from .tracing import Attributes, Tracer


def item_of(
    sequence: Sequence,
    tokens: list[SampledToken],
    finish: Finish | None = None,
    transfer: Mapping[str, float] | None = None,
) -> TokenItem:
    """`tokens` are the sequence's newest; with its first ones goes what is told once."""
    wanted = sequence.params.logprobs is not None
    first = not tokens or sequence.num_generated == len(tokens)
    drafting = sequence.drafting
    return TokenItem(
        sequence.id,
        index=sequence.num_generated - len(tokens),
        token_ids=[token.token_id for token in tokens],
        logprobs=[wire_logprob(token) for token in tokens] if wanted else None,
        prompt_logprobs=sequence.prompt_logprobs if first and sequence.prompt_logprobs else None,
        finish=finish,
        cached=sequence.cached_tokens if first else 0,
        accepted=drafting.num_accepted if drafting else 0,
        rejected=drafting.num_drafted - drafting.num_accepted if drafting else 0,
        timing={"queue_s": (sequence.started_ns - sequence.arrived_ns) / 1e9, **(transfer or {})} if first else {},
    )


def wire_logprob(token: SampledToken) -> WireLogprob:
    return [token.logprob, [list(pair) for pair in token.top]]


def trace_prefill(tracer: Tracer, worker: str, sequence: Sequence) -> None:
    attributes: Attributes = {"braid.worker": worker, "gen_ai.usage.input_tokens": sequence.num_prompt}
    tracer.record("prefill", sequence.carrier, sequence.started_ns, time.time_ns(), attributes)


def trace_transfer(tracer: Tracer, sequence: Sequence, ended_ns: int) -> dict[str, float]:
    """Returns what the front end is told of it. `kv_send_s` is the part of its time in which nothing else was done."""
    started_ns = sequence.kv_started_ns or ended_ns  # 0: the decode worker held every row
    spent = {"kv_s": (ended_ns - started_ns) / 1e9, "kv_send_s": sequence.kv_send_ns / 1e9}
    attributes: Attributes = {
        "braid.kv.bytes": sequence.kv_bytes,
        "braid.kv.send_s": spent["kv_send_s"],
        "braid.kv.tokens_held": sequence.kv_have,
        "braid.to": sequence.target,
    }
    tracer.record("kv_transfer", sequence.carrier, started_ns, ended_ns, attributes)
    return {**spent, "kv_bytes": sequence.kv_bytes}


def trace_decode(tracer: Tracer, worker: str, sequence: Sequence, item: TokenItem) -> None:
    attributes: Attributes = {
        "braid.worker": worker,
        "gen_ai.usage.output_tokens": sequence.num_generated,
        "braid.drafts.accepted": item.accepted,
        "braid.drafts.rejected": item.rejected,
    }
    tracer.record("decode", sequence.carrier, sequence.started_ns, time.time_ns(), attributes)
