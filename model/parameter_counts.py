"""Counts parameters and bytes from a config alone: pure arithmetic over the table of tensor names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..kernels.quant import scale_shape
from .config import ModelConfig
from .tensor_names import (
    Role,
    expected_tensors,
    expert_tensors,
    is_quantised_in_fp8,
    layer_tensors,
    mtp_copies,
    mtp_layers,
)

Shapes = Mapping[str, tuple[int, ...]]
EMBEDDING, ROUTED = "embedding", "routed experts"
_PARTS = (
    ("embed_tokens", EMBEDDING),
    ("lm_head", "output head"),
    (".self_attn.", "attention"),
    (".mlp.experts.", ROUTED),
    (".mlp.shared_experts.", "shared experts"),
    (".mlp.gate.", "gates"),
    (".mlp.", "dense MLPs"),
    ("norm", "norms"),
)


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    total: int
    activated: int  # what one token goes through


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of some tensors as float32, as bfloat16 and as an fp8 checkpoint holds them."""

    name: str
    float32: int
    bfloat16: int
    fp8: int


@dataclass(frozen=True, slots=True)
class MtpCount:
    unique: int  # all of the modules but their copies of embedding and head
    in_layers: int  # of these, what lies in their decoder layers: the figure DeepSeek publishes


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def tensors_of(config: ModelConfig, *roles: Role) -> dict[str, tuple[int, ...]]:
    return expected_tensors(config, roles)


def count_parts(config: ModelConfig) -> tuple[Part, ...]:
    """The main model. Of the embedding a token reads one row; of the routed experts its top-k."""
    totals: dict[str, int] = {}
    for name, shape in tensors_of(config, "attention", "experts").items():
        part = next(part for mark, part in _PARTS if mark in name)
        totals[part] = totals.get(part, 0) + math.prod(shape)
    activated = dict(totals)
    if not config.tie_word_embeddings:  # where it is the head too, it is read whole
        activated[EMBEDDING] = config.hidden_size
    if ROUTED in totals:
        activated[ROUTED] = totals[ROUTED] * config.num_experts_per_tok // (config.n_routed_experts or 1)
    return tuple(Part(name, total, activated[name]) for name, total in totals.items())


def count_mtp(config: ModelConfig) -> MtpCount:
    copies = mtp_copies(config)
    unique = {name: shape for name, shape in tensors_of(config, "mtp").items() if name not in copies}
    layers = (layer_tensors(config, layer) | expert_tensors(config, layer) for layer in mtp_layers(config))
    return MtpCount(count(unique), sum(count(layer) for layer in layers))


def count_stored(config: ModelConfig) -> tuple[Stored, ...]:
    """What each role holds."""
    rows = [_stored("attention worker", tensors_of(config, "attention"))]
    moe_layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    if moe_layers:
        every: dict[str, tuple[int, ...]] = {}
        for layer in moe_layers:
            every |= expert_tensors(config, layer, [0])
        rows.append(_stored("all routed experts", tensors_of(config, "experts")))
        rows.append(_stored("one expert in all layers", every))
        rows.append(_stored("one expert in one layer", expert_tensors(config, moe_layers[0], [0])))
    if config.num_nextn_predict_layers:
        rows.append(_stored("MTP module", tensors_of(config, "mtp")))
    return tuple(rows)


def _stored(name: str, shapes: Shapes) -> Stored:
    total = count(shapes)
    matrices = [shape for tensor, shape in shapes.items() if is_quantised_in_fp8(tensor)]
    quantised = sum(math.prod(shape) for shape in matrices)
    scales = sum(math.prod(scale_shape(shape)) for shape in matrices)
    return Stored(name, 4 * total, 2 * total, quantised + 4 * scales + 2 * (total - quantised))
