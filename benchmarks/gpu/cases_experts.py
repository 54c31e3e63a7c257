"""Cases of an expert worker: the dispatch index, and the products of the experts that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from braid.kernels.gpu import experts, experts_bf16, index
from braid.kernels.gpu.norm import Quantised
from braid.model.config import ModelConfig

from .cases import Case, Draw, Run, Target, Work, widened, widened_weight
from .cases_products import swiglu_mlp

Weights = Callable[[int], tuple[Tensor, Tensor]]  # w13 and w2 of an expert, float64
FEW = 128  # tokens of the whole cluster in decode


def cases(config: ModelConfig, rows: int, held: int) -> Iterator[Case]:
    """`rows` tokens choose among all experts, of which this worker holds the first `held`."""
    pairs = rows * config.num_experts_per_tok
    yield Case(
        "dispatch index", f"{held} of {config.n_routed_experts} experts", rows, Work(pairs * 4 * (held + 2)), 0.0,
        lambda draw: _index(draw, config, rows, held),
    )  # fmt: skip
    yield grouped_case(config, rows, held)


def grouped_case(config: ModelConfig, rows: int, held: int) -> Case:
    is_fp8 = config.quantization is not None
    return Case(
        f"experts {'fp8' if is_fp8 else 'bf16'}", f"{held} of {config.n_routed_experts} experts", rows,
        expert_work(config, rows, held), 0.04 if is_fp8 else 0.01,
        lambda draw: _grouped(draw, config, rows, held),
        Target("bandwidth", 0.75) if is_fp8 and rows <= FEW else None,
    )  # fmt: skip


def expert_work(config: ModelConfig, rows: int, held: int) -> Work:
    """What uniform routing gives on the average."""
    total, slots = config.n_routed_experts or 1, config.num_experts_per_tok
    return _work(config, rows * slots * held / total, held * (1 - (1 - slots / total) ** rows))


def _work(config: ModelConfig, ours: float, read: float) -> Work:
    """Of `ours` pairs; `read` experts, those that some token asks for, are read once."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    itemsize = 1 if config.quantization is not None else 2
    num_bytes = read * 3 * hidden * inner * itemsize + ours * (hidden * (itemsize + 2) + 2 * inner * itemsize)
    return Work(num_bytes, ours * 6.0 * hidden * inner, "fp8" if itemsize == 1 else "bf16")


def chosen(draw: Draw, config: ModelConfig, rows: int, held: int) -> Tensor:
    """int64 [P]: the place of each pair's expert here, -1 where it is elsewhere. A token's experts differ."""
    total = config.n_routed_experts or 1
    order = torch.rand(rows, total, device=draw.device).argsort(-1)[:, : config.num_experts_per_tok].flatten()
    return torch.where(order < held, order, -1)


def _index(draw: Draw, config: ModelConfig, rows: int, held: int) -> Run:
    expert_of_pair = chosen(draw, config, rows, held)
    num_ours = 0 if expert_of_pair.is_meta else int((expert_of_pair >= 0).sum())

    def expected() -> Tensor:
        """Our pairs expert by expert, each expert's in their order; what follows them is undefined."""
        return torch.cat([(expert_of_pair == expert).nonzero().flatten() for expert in range(held)])

    return Run(lambda: index.dispatch_index(expert_of_pair, held).pair_of_row[:num_ours], expected)


def _grouped(draw: Draw, config: ModelConfig, rows: int, held: int) -> Run:
    """From the index on, as an expert worker gets the rows: what it returns for the pairs that are its own."""
    hidden, inner, slots = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    expert_of_pair = chosen(draw, config, rows, held)
    out = torch.zeros(expert_of_pair.numel(), hidden, dtype=torch.bfloat16, device=draw.device)
    found = index.dispatch_index(expert_of_pair, held)
    row_of_pair = torch.arange(rows, device=draw.device).repeat_interleave(slots)
    mine = None if expert_of_pair.is_meta else expert_of_pair[expert_of_pair >= 0]
    work = None if mine is None else _work(config, len(mine), len(set(mine.tolist())))
    if config.quantization is None:
        x = draw.normal(rows, hidden)
        w13 = draw.normal(held, 2 * inner, hidden, scale=hidden**-0.5)
        w2 = draw.normal(held, hidden, inner, scale=inner**-0.5)

        def plain(expert: int) -> tuple[Tensor, Tensor]:
            return w13[expert].double(), w2[expert].double()

        return Run(
            lambda: experts_bf16.grouped_mlp_bf16(x, row_of_pair, found, w13, w2, out),
            lambda: _expected(x.double(), slots, expert_of_pair, held, plain),
            work,
        )
    codes: Quantised = draw.activations(rows, hidden)
    up, up_scales = draw.block_weight(2 * inner, hidden, held)
    down, down_scales = draw.block_weight(hidden, inner, held)

    def dequantised(expert: int) -> tuple[Tensor, Tensor]:
        first = widened_weight(up[expert], up_scales[expert])
        return first, widened_weight(down[expert], down_scales[expert])

    return Run(
        lambda: experts.grouped_mlp_fp8(codes, row_of_pair, found, up, up_scales, down, down_scales, False, out),
        lambda: _expected(widened(codes), slots, expert_of_pair, held, dequantised),
        work,
    )


def _expected(x: Tensor, slots: int, expert_of_pair: Tensor, held: int, weights: Weights) -> Tensor:
    out = torch.zeros(expert_of_pair.numel(), x.shape[1], dtype=torch.float64, device=x.device)
    for expert in range(held):
        mine = (expert_of_pair == expert).nonzero().flatten()
        if mine.numel():
            out[mine] = swiglu_mlp(x[mine // slots], *weights(expert))
    return out
