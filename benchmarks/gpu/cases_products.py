"""Cases of the dense products: fp8 blocks where the model has them, else bf16; lm_head in bf16 always."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from braid.kernels.gpu import gemm, mlp
from braid.kernels.gpu.scales import num_groups
from braid.model.config import ModelConfig

from .cases import Case, Draw, Run, Target, Work, widened, widened_weight

FEW, MANY = 64, 1024  # rows up to which the weights' bytes bind, and from which arithmetic does


def cases(config: ModelConfig, rows: int) -> Iterator[Case]:
    for name, inputs, outputs in matrices(config):
        if config.quantization is not None:
            yield _fp8_case(name, rows, inputs, outputs)
        else:
            yield _bf16_case(name, rows, inputs, outputs)
    yield _mlp_case(config, rows)
    if rows < MANY:  # only the last row of a prompt asks for logits
        yield _bf16_case("lm_head", rows, config.hidden_size, config.vocab_size)


def matrices(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of the attention's matrices and the shared expert's."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    q_rank = config.q_lora_rank or 0
    yield "qkv_a", hidden, q_rank + config.latent_dim
    yield "q_b", q_rank or hidden, heads * config.qk_head_dim
    yield "kv_b", config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield "o_proj", heads * config.v_head_dim, hidden
    yield "shared w13", hidden, 2 * config.shared_intermediate_size
    yield "shared w2", config.shared_intermediate_size, hidden


def _fp8_case(name: str, rows: int, inputs: int, outputs: int) -> Case:
    num_bytes = inputs * outputs + rows * (inputs + 4 * num_groups(inputs) + 2 * outputs)
    target = Target("bandwidth", 0.75) if rows <= FEW else Target("rate", 0.5) if rows >= MANY else None
    return Case(
        "fp8 product", f"{name} {inputs} -> {outputs}", rows, Work(num_bytes, 2.0 * rows * inputs * outputs, "fp8"),
        0.004, lambda draw: _fp8(draw, rows, inputs, outputs), target,
    )  # fmt: skip


def _fp8(draw: Draw, rows: int, inputs: int, outputs: int) -> Run:
    x, (weight, scales) = draw.activations(rows, inputs), draw.block_weight(outputs, inputs)
    return Run(lambda: gemm.linear_fp8(x, weight, scales), lambda: widened(x) @ widened_weight(weight, scales).T)


def _bf16_case(name: str, rows: int, inputs: int, outputs: int) -> Case:
    num_bytes = 2 * (inputs * outputs + rows * (inputs + outputs))
    return Case(
        "bf16 product", f"{name} {inputs} -> {outputs}", rows, Work(num_bytes, 2.0 * rows * inputs * outputs), 0.004,
        lambda draw: _bf16(draw, rows, inputs, outputs),
    )  # fmt: skip


def _bf16(draw: Draw, rows: int, inputs: int, outputs: int) -> Run:
    x, weight = draw.normal(rows, inputs), draw.normal(outputs, inputs, scale=inputs**-0.5)
    return Run(lambda: gemm.linear_bf16(x, weight), lambda: x.double() @ weight.double().T)


def _mlp_case(config: ModelConfig, rows: int) -> Case:
    hidden, inner, is_fp8 = config.hidden_size, config.shared_intermediate_size, config.quantization is not None
    itemsize = 1 if is_fp8 else 2
    num_bytes = 3 * hidden * inner * itemsize + rows * (hidden * (itemsize + 2) + 2 * inner * itemsize)
    work = Work(num_bytes, 6.0 * rows * hidden * inner, "fp8" if is_fp8 else "bf16")
    return Case(
        f"shared expert {'fp8' if is_fp8 else 'bf16'}", f"{hidden} -> {inner} -> {hidden}", rows, work,
        0.04 if is_fp8 else 0.01, lambda draw: (_mlp_fp8 if is_fp8 else _mlp_bf16)(draw, rows, hidden, inner),
    )  # fmt: skip


def _mlp_fp8(draw: Draw, rows: int, hidden: int, inner: int) -> Run:
    x, w13, w2 = draw.activations(rows, hidden), draw.block_weight(2 * inner, hidden), draw.block_weight(hidden, inner)
    return Run(
        lambda: mlp.swiglu_mlp_fp8(x, *w13, *w2, False),
        lambda: swiglu_mlp(widened(x), widened_weight(*w13), widened_weight(*w2)),
    )


def _mlp_bf16(draw: Draw, rows: int, hidden: int, inner: int) -> Run:
    x, w13 = draw.normal(rows, hidden), draw.normal(2 * inner, hidden, scale=hidden**-0.5)
    w2 = draw.normal(hidden, inner, scale=inner**-0.5)
    return Run(lambda: mlp.swiglu_mlp_bf16(x, w13, w2), lambda: swiglu_mlp(x.double(), w13.double(), w2.double()))


def swiglu_mlp(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """float64."""
    gate, up = (x @ w13.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ w2.T
