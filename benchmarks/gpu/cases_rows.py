"""Cases of what is done row by row: norms and quantisation, combine, gate, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from braid.kernels.gpu import combine, gate, norm, sample
from braid.kernels.gpu.sample import SamplingRows
from braid.model.config import ModelConfig
from braid.model.sampler import Sampler
from braid.model.sampling_params import SamplingParams
from braid.router.gate import route

from .cases import Case, Draw, Run, Target, Work

COPY_SHARE = Target("bandwidth", 0.85)
FULL = 1024  # rows from which the launch itself no longer counts


def cases(config: ModelConfig, rows: int) -> Iterator[Case]:
    target = COPY_SHARE if rows >= FULL else None
    hidden, heads_out = config.hidden_size, config.num_attention_heads * config.v_head_dim
    bytes_normed = rows * hidden * 6  # read twice, written back once, bf16
    if config.quantization is not None:
        yield Case(
            "residual + RMSNorm + quantise", f"{hidden}", rows, Work(bytes_normed + rows * hidden), 0.04,
            lambda draw: _norm_quantised(draw, rows, hidden), target,
        )  # fmt: skip
        yield Case(
            "quantise", f"{heads_out}", rows, Work(rows * heads_out * 3), 0.04,
            lambda draw: _quantised(draw, rows, heads_out), target,
        )  # fmt: skip
    yield Case(
        "residual + RMSNorm", f"{hidden}", rows, Work(bytes_normed + rows * hidden * 2), 0.004,
        lambda draw: _norm(draw, rows, hidden), target,
    )  # fmt: skip
    slots, experts = config.num_experts_per_tok, config.n_routed_experts or 0
    yield Case(
        "combine", f"{slots} x {hidden}", rows, Work(rows * hidden * 2 * (slots + 2)), 0.004,
        lambda draw: _combine(draw, rows, slots, hidden), target,
    )  # fmt: skip
    yield Case(
        "gate logits", f"{hidden} -> {experts}", rows,
        Work((rows + experts) * hidden * 2 + rows * experts * 4, 2.0 * rows * hidden * experts), 1e-4,
        lambda draw: _gate_logits(draw, rows, hidden, experts),
    )  # fmt: skip
    yield Case(
        "gate top-k", f"{slots} of {experts}", rows, Work(rows * experts * 4), 0.002,  # scores of an ulp's distance
        lambda draw: _gate(draw, config, rows),
    )  # fmt: skip
    if rows >= FULL:  # only the last row of a prompt is sampled
        return
    yield Case(
        "greedy", f"{config.vocab_size}", rows, Work(rows * config.vocab_size * 4), 0.0,
        lambda draw: _greedy(draw, rows, config.vocab_size),
    )  # fmt: skip
    for name, top_k, top_p in (("temperature 0.8", 0, 1.0), ("temperature 0.8, top-k 50, top-p 0.9", 50, 0.9)):
        yield Case(  # a sum of masses may end on the other side of 0.9 than the CPU's: one row in a hundred, at most
            "sample", f"{config.vocab_size}, {name}", rows, Work(rows * config.vocab_size * 4), 0.01 if top_k else 0.0,
            partial(_sample, rows=rows, vocab=config.vocab_size, top_k=top_k, top_p=top_p),
        )  # fmt: skip


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight.double()


def _norm(draw: Draw, rows: int, hidden: int) -> Run:
    x, delta, weight = draw.normal(rows, hidden), draw.normal(rows, hidden), draw.normal(hidden)
    total = (x.double() + delta.double()).bfloat16()
    return Run(lambda: norm.add_rms_norm(x, delta, weight, 1e-6), lambda: _normed(total.double(), weight))


def _norm_quantised(draw: Draw, rows: int, hidden: int) -> Run:
    x, delta, weight = draw.normal(rows, hidden), draw.normal(rows, hidden), draw.normal(hidden)
    total = (x.double() + delta.double()).bfloat16()
    return Run(
        lambda: norm.add_rms_norm_quantised(x, delta, weight, 1e-6, False), lambda: _normed(total.double(), weight)
    )


def _quantised(draw: Draw, rows: int, columns: int) -> Run:
    x = draw.normal(rows, columns)
    return Run(lambda: norm.quantise(x, False), lambda: x.double())


def _combine(draw: Draw, rows: int, slots: int, hidden: int) -> Run:
    shared, parts, weights = draw.normal(rows, hidden), draw.normal(rows, slots, hidden), draw.positive(rows, slots)
    return Run(
        lambda: combine.combine(shared, parts, weights),
        lambda: shared.double() + (parts.double() * weights.double()[..., None]).sum(1),
    )


def _gate_logits(draw: Draw, rows: int, hidden: int, experts: int) -> Run:
    x, weight = draw.normal(rows, hidden), draw.normal(experts, hidden, scale=hidden**-0.5)
    return Run(lambda: gate.gate_logits(x, weight), lambda: x.double() @ weight.double().T)


def _gate(draw: Draw, config: ModelConfig, rows: int) -> Run:
    logits, bias = draw.wide(rows, config.n_routed_experts or 0), draw.wide(config.n_routed_experts or 0).mul_(0.1)
    rules = (
        config.scoring_func, config.topk_method, config.num_experts_per_tok, config.n_group, config.topk_group,
        config.norm_topk_prob, config.routed_scaling_factor,
    )  # fmt: skip
    return Run(lambda: gate.route(logits, bias, *rules)[0], lambda: route(logits.cpu(), bias.cpu(), *rules)[0])


def _greedy(draw: Draw, rows: int, vocab: int) -> Run:
    logits = draw.wide(rows, vocab)
    return Run(lambda: sample.greedy(logits), lambda: logits.argmax(-1))


def _sample(draw: Draw, rows: int, vocab: int, top_k: int, top_p: float) -> Run:
    logits, seeds = draw.wide(rows, vocab), draw.integers(1 << 40, rows, dtype=torch.int64)
    positions = draw.integers(4096, rows, dtype=torch.int64)
    temperature = torch.full((rows,), 0.8, dtype=torch.float64, device=draw.device)
    asked = SamplingRows(
        temperature, torch.zeros_like(temperature), torch.full_like(temperature, top_p),
        torch.full_like(seeds, top_k), seeds, positions,
    )  # fmt: skip

    def expected() -> Tensor:
        params = [
            SamplingParams(max_tokens=1, temperature=0.8, top_k=top_k, top_p=top_p, seed=seed)
            for seed in seeds.tolist()
        ]
        on_host, asked_of = Sampler(logits), enumerate(zip(params, positions.tolist(), strict=True))
        return torch.tensor([on_host.choose(row, own, position) for row, (own, position) in asked_of])

    return Run(lambda: sample.sample(logits, asked, has_top_k=top_k > 0, has_top_p=top_p < 1), expected)
