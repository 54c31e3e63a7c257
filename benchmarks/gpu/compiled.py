"""Every way in which kernels/gpu are launched: what the compile gate compiles, by the launchers themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from braid.kernels.gpu import experts, gate, gemm, index, mail, norm
from braid.model.config import ModelConfig

from . import cases_attention, cases_experts, cases_products, cases_rows
from .cases import Case, Draw
from .launches import Launch, recorded
from .sizes import BUNDLED, V3

META = torch.device("meta")
ROWS = (1, 16, 32, 64, 128, 4096)


def launches() -> tuple[dict[Launch, str], list[str]]:
    """Each different launch with the first shape that asks for it; and which shapes could not be launched, and why."""
    found: dict[Launch, str] = {}
    failed = []
    for shape, work in _works():
        try:
            for launch in recorded(work):
                found.setdefault(launch, shape)
        except Exception as error:  # a launcher's own, of any kind: the others are compiled all the same
            failed.append(f"{shape}: {type(error).__name__}: {error}")
    return found, failed


def _works() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, config in (("V3", V3), ("V3 bf16", replace(V3, quantization=None)), ("bundled", BUNDLED)):
        for case in cases(config):
            yield f"{name}: {case.name}", partial(_run, case)
        yield f"{name}: norms and quantisation of any width", partial(_norms, config)
    yield "V3: other options", _variants
    yield "V3: mail", _mail


def cases(config: ModelConfig) -> Iterator[Case]:
    for rows in ROWS:
        yield from cases_rows.cases(config, rows)
        yield from cases_products.cases(config, rows)
        yield from cases_attention.row_cases(config, rows)
        for held in (8, 32):
            yield from cases_experts.cases(config, rows, min(held, config.n_routed_experts or held))
    for heads in {config.num_attention_heads, 64, 32, 16}:
        for queries in (1, 2, 3):
            yield cases_attention.decode_case(config, 32, 4096, heads, queries)
    yield cases_attention.prefill_case(config, 4096)
    yield cases_attention.prefill_case(config, 512, 2048)


def _run(case: Case) -> None:
    case.bind(Draw(META)).actual()


def _norms(config: ModelConfig) -> None:
    """Of the stream and of the latent queries, which lie in longer rows; of what else is multiplied in fp8."""
    draw, hidden = Draw(META), config.hidden_size
    has_fp8, values = config.quantization is not None, config.num_attention_heads * config.v_head_dim
    for width in (hidden, config.q_lora_rank or hidden):
        x, weight = draw.normal(32, width + 64)[:, :width], draw.normal(width)
        for delta in (None, x):
            norm.add_rms_norm(x, delta, weight, 1e-6)
            for ue8m0 in (False, True) if has_fp8 else ():
                for out in (None, x):
                    norm.add_rms_norm_quantised(x, delta, weight, 1e-6, ue8m0, out)
    for width in (hidden, 2 * hidden, config.kv_lora_rank, values) if has_fp8 else ():
        for ue8m0 in (False, True):
            norm.quantise(draw.normal(32, width + 64)[:, :width], ue8m0)


def _variants() -> None:
    """What no case above asks for: V3.1's scales, a bias, fp32 gates, routing of V2 and Kimi-K2."""
    draw, hidden = Draw(META), V3.hidden_size
    x = draw.normal(32, hidden)
    gemm.linear_bf16(x, draw.normal(512, hidden), draw.normal(512))
    gemm.linear_bf16(x, draw.normal(512, hidden), out=draw.wide(32, 512))
    gate.gate_logits(x, draw.wide(V3.n_routed_experts or 0, hidden))
    logits = draw.wide(32, 160)
    gate.route(logits, None, "softmax", "group_limited_greedy", 6, 8, 3, False, 16.0)
    gate.route(logits, None, "softmax", "greedy", 6, 1, 1, False, 1.0)
    gate.route(draw.wide(32, 384), draw.wide(384), "sigmoid", "noaux_tc", 8, 1, 1, True, 2.827)
    codes, inner = draw.activations(32, hidden), V3.moe_intermediate_size
    for tile in (16, 32, 64):
        found = index.dispatch_index(draw.integers(8, 32 * 8, dtype=torch.int64), 8, tile)
        up, down = draw.block_weight(2 * inner, hidden, 8), draw.block_weight(hidden, inner, 8)
        rows = torch.arange(32 * 8, device=META)
        experts.grouped_mlp_fp8(codes, rows, found, *up, *down, True, draw.normal(32 * 8, hidden))


def _mail() -> None:
    """Rows to experts of the same host: tables of addresses as kernels/gpu/mail.py describes them."""
    rows, slots, hidden, experts = 32, V3.num_experts_per_tok, V3.hidden_size, V3.n_routed_experts or 0
    draw, peers = Draw(META), torch.empty(mail.NUM_ADDRESSES, mail.MAX_PEERS, dtype=torch.int64, device=META)
    x, ids = draw.normal(rows, hidden), draw.integers(experts, rows, slots, dtype=torch.int64)
    owners, loads = draw.integers(2, experts), draw.integers(2, experts)
    owed, sequence = draw.integers(2, 4, mail.MAX_PEERS), draw.integers(2, 4, dtype=torch.int64)
    failed, phase = draw.integers(2, mail.MAX_PEERS), draw.integers(2, 1)
    mail.post(x, ids, 3, 0, rows, owners, peers, owed, sequence, phase, loads)
    mail.await_rows(0, peers, owed, sequence, failed, failed, failed, 1000)
    mail.land(ids, 0, rows, owners, peers, failed, draw.normal(rows * slots, hidden))
    jobs, local = draw.integers(2, 4, mail.NUM_JOB_FIELDS, dtype=torch.int64), draw.integers(2, experts)
    for copies in (False, True):
        mail.take_in(jobs, local, x, ids, copies)
    mail.deliver(jobs, draw.normal(rows * slots, hidden), ids)
    mail.signal(jobs)
