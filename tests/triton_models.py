"""Small checkpoints and the networks that the Triton kernels, in the interpreter, make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton_interpreter
from torch import Tensor

from braid.model.checkpoint import Checkpoint
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.kv_cache import LatentCache
from braid.model.network_weights import AttentionWeights, ExpertWeights
from braid.model.ops import Ops
from braid.model.triton_ops import TritonOps
from braid.model.weights import load_attention, load_experts

triton_interpreter.repair()

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32
WriteCheckpoint = Callable[..., Path]
BLOCKS = [2, 0, 3, 1]

# Sizes that fill neither a tile nor a block of scales; a dense layer whose MLP cannot stay fp8, as its halves do not
# begin at one; shared and routed experts that can.
FP8: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 128,
    "intermediate_size": 136,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 0.5,  # a row that chooses another expert by a hair need not give another token
}
PLAIN: dict[str, Any] = {
    **FP8,
    "hidden_size": 66,
    "q_lora_rank": None,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "moe_intermediate_size": 30,
    "attention_bias": True,
    "num_attention_heads": 3,
}


@dataclass(frozen=True)
class Loaded:
    weights: AttentionWeights
    experts: dict[int, ExpertWeights]
    checkpoint: Checkpoint
    dtype: torch.dtype

    @classmethod
    def of(cls, path: Path, dtype: torch.dtype, ops: Ops) -> Loaded:
        checkpoint = Checkpoint(path)
        weights = load_attention(checkpoint, checkpoint.config, dtype, has_mtp=True, ops=ops)
        every = range(checkpoint.config.n_routed_experts or 0)
        experts = load_experts(checkpoint, checkpoint.config, range(3), every, dtype, ops=ops)
        return cls(weights, experts, checkpoint, dtype)

    def network(self) -> DeepSeekModel:
        """Over a cache whose unwritten rows are NaN, with a layer for the MTP module."""
        cache = LatentCache(self.checkpoint.config, len(BLOCKS), self.dtype, 3)
        for layer in cache.layers:
            layer.fill_(torch.nan)
        return DeepSeekModel(self.checkpoint.config, self.weights, cache, LocalExperts(self.experts))


def triton_ops(path: Path) -> TritonOps:
    return TritonOps(CPU, Checkpoint(path).config.quantization)


def token_ids(count: int) -> Tensor:
    return torch.randint(160, (count,), generator=torch.Generator().manual_seed(1))


def run(network: DeepSeekModel, ids: Tensor, start: int, absorbed: bool) -> Tensor:
    logits: Tensor = network.forward(
        Batch(ids, [Segment(start, len(ids), BLOCKS, absorbed)], torch.arange(len(ids)))
    ).logits
    return logits
