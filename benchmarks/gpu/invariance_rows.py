"""Law 5 of what is done row by row, and how bits of a part are held against those of the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from braid.kernels.gpu import combine, gate, latent, norm, sample
from braid.kernels.gpu.sample import SamplingRows

from .cases_attention import angles
from .setting import Row, Setting
from .sizes import BLOCK_SIZE

Part = Callable[[slice], Tensor]


def num_rows(setting: Setting) -> int:
    return 300 if setting.is_full_size else 5


def compared(whole: Tensor, part: Part) -> Row:
    slices = _slices(len(whole))
    differing = [f"{s.start}:{s.stop}" for s in slices if not same(whole[s], part(s))]
    return {"passed": not differing, "differing": differing, "parts": len(slices)}


def _slices(rows: int) -> list[slice]:
    """Single rows, tiles that are not full, tiles begun anywhere, every token tile."""
    sizes = [(0, 1), (5, 6), (0, 16), (3, 20), (0, 33), (7, 71), (0, 128), (1, 201), (2, 4)]
    return [slice(begin, end) for begin, end in sizes if end <= rows]


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: NaN equals itself."""
    return torch.equal(_bits(one), _bits(other))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def normed(setting: Setting) -> Row:
    rows, hidden, draw = num_rows(setting), setting.config.hidden_size, setting.draw
    x, delta, weight = draw.normal(rows, hidden), draw.normal(rows, hidden), draw.normal(hidden)
    return compared(
        norm.add_rms_norm(x.clone(), delta, weight, 1e-6),
        lambda part: norm.add_rms_norm(x[part].clone(), delta[part], weight, 1e-6),
    )


def quantised(setting: Setting) -> Row:
    x = setting.draw.normal(num_rows(setting), setting.config.hidden_size)

    def codes_and_scales(part: slice) -> Tensor:
        to = norm.quantise(x[part], False)
        return torch.cat((_bits(to.codes), _bits(to.scales.t())), 1)

    return compared(codes_and_scales(slice(None)), codes_and_scales)


def logits(setting: Setting) -> Row:
    config, draw = setting.config, setting.draw
    x = draw.normal(num_rows(setting), config.hidden_size)
    weight = draw.normal(config.n_routed_experts or 1, config.hidden_size, scale=config.hidden_size**-0.5)
    return compared(gate.gate_logits(x, weight), lambda part: gate.gate_logits(x[part], weight))


def choice(setting: Setting) -> Row:
    config, experts = setting.config, setting.config.n_routed_experts or 1
    of_gate, bias = setting.draw.wide(num_rows(setting), experts), setting.draw.wide(experts)

    def ids_and_weights(part: slice) -> Tensor:
        ids, weights = gate.route(
            of_gate[part], bias, config.scoring_func, config.topk_method, config.num_experts_per_tok, config.n_group,
            config.topk_group, config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip
        return torch.cat((_bits(ids), _bits(weights)), 1)

    return compared(ids_and_weights(slice(None)), ids_and_weights)


def combined(setting: Setting) -> Row:
    config, draw, rows = setting.config, setting.draw, num_rows(setting)
    slots, hidden = config.num_experts_per_tok, config.hidden_size
    shared, parts, weights = draw.normal(rows, hidden), draw.normal(rows, slots, hidden), draw.positive(rows, slots)
    return compared(
        combine.combine(shared, parts, weights),
        lambda part: combine.combine(shared[part], parts[part], weights[part]),
    )


def latents(setting: Setting) -> Row:
    config, draw, rows = setting.config, setting.draw, num_rows(setting)
    x, weight = draw.normal(rows, config.latent_dim), draw.normal(config.kv_lora_rank)
    cos, sin = angles(draw, rows, config.qk_rope_head_dim)

    def written(part: slice) -> Tensor:
        own = x[part]
        cache = torch.zeros(-(-len(own) // BLOCK_SIZE), BLOCK_SIZE, config.latent_dim, dtype=x.dtype, device=x.device)
        slots = torch.arange(len(own), device=x.device)
        latent.write_latents(own, weight, 1e-6, cos[part], sin[part], slots, cache, interleaved=True)
        return cache.flatten(0, 1)[: len(own)]

    return compared(written(slice(None)), written)


def sampled(setting: Setting) -> Row:
    """Each row asks for something else."""
    draw, rows, vocab = setting.draw, num_rows(setting), setting.config.vocab_size
    of_head, every = draw.wide(rows, vocab), torch.arange(rows, device=setting.device)
    asked = SamplingRows(
        temperature=(every % 3).double() / 2, min_p=(every % 5).double() / 100, top_p=1 - (every % 4).double() / 20,
        top_k=every % 7 * 10, seeds=draw.integers(1 << 40, rows, dtype=torch.int64), positions=every + 1000,
    )  # fmt: skip

    def tokens(part: slice) -> Tensor:
        return sample.sample(of_head[part], SamplingRows(*(asks[part] for asks in asked)), True, True)

    return compared(tokens(slice(None)), tokens)
