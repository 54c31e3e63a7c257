"""Our network over the random oracle models, with a cache whose unwritten rows are NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from generators import make_hf_model, save_hf_model
from safetensors.torch import load_file
from torch import Tensor, nn

from braid.kernels import native
from braid.model.config import ModelConfig
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import ExpertBackend, LocalExperts
from braid.model.kv_cache import LatentCache
from braid.model.native_ops import NativeOps
from braid.model.network_weights import PLAIN, AttentionWeights, ExpertWeights, from_state_dict
from braid.model.ops import Ops

NUM_BLOCKS = 24
DTYPES = (torch.float32, torch.bfloat16)
# Every family of operations that this machine can run.
FAMILIES: dict[str, Ops] = {"reference": PLAIN}
if all(native.available(dtype) for dtype in DTYPES):
    FAMILIES["native"] = NativeOps()


@dataclass(frozen=True)
class SmallModel:
    config: ModelConfig
    state: Mapping[str, Tensor]
    weights: AttentionWeights
    experts: Mapping[int, ExpertWeights]
    oracle: nn.Module

    def network(self, experts: ExpertBackend | None = None) -> DeepSeekModel:
        latents = LatentCache(self.config, NUM_BLOCKS, self.weights.norm.dtype)
        for layer in latents.layers:
            layer.fill_(torch.nan)
        return DeepSeekModel(self.config, self.weights, latents, experts or LocalExperts(self.experts))

    def token_ids(self, count: int, seed: int = 1) -> Tensor:
        return torch.randint(self.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


@cache
def small_model(shape_name: str, dtype: torch.dtype = torch.float32, ops: Ops = PLAIN) -> SmallModel:
    """Written by transformers to a folder and read back from it; its weights packed for `ops`."""
    oracle, _ = make_hf_model(shape_name)
    with TemporaryDirectory() as folder:
        path = save_hf_model(oracle, Path(folder))
        config, state = ModelConfig.from_path(path), load_file(path / "model.safetensors")
    weights, experts = from_state_dict(config, state, dtype, ops)
    return SmallModel(config, state, weights, experts, oracle)


def shuffled_table(seed: int = 0, count: int = NUM_BLOCKS) -> list[int]:
    table: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return table


def run(network: DeepSeekModel, ids: Tensor, start: int, table: list[int], absorbed: bool = False, **kw: Any) -> Tensor:
    """Logits of every row of one segment."""
    segment = Segment(start, len(ids), table, absorbed)
    logits: Tensor = network.forward(Batch(ids, [segment], torch.arange(len(ids))), **kw).logits
    return logits


def run_in_chunks(
    network: DeepSeekModel, ids: Tensor, sizes: Sequence[int], table: list[int], absorbed: bool = False
) -> Tensor:
    """Logits of every row, the sequence cut at `sizes`, the last of which repeats."""
    rows, start, step = [], 0, 0
    while start < len(ids):
        size = sizes[min(step, len(sizes) - 1)]
        rows.append(run(network, ids[start : start + size], start, table, absorbed))
        start, step = start + size, step + 1
    return torch.cat(rows)
