"""Latent KV cache in blocks of 64 tokens, and the pure allocator that hands the blocks out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .config import ModelConfig

BLOCK_SIZE = 64


class OutOfBlocks(Exception):
    """No room now: wait for a sequence to finish, or refuse with "busy"."""


class LatentCache:
    """`layers[i]`: [num_blocks, BLOCK_SIZE, latent_dim]: normed kv latent, then roped k_pe, one row a token."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, num_layers: int | None = None) -> None:
        shape = (num_blocks, BLOCK_SIZE, config.latent_dim)
        count = config.num_hidden_layers if num_layers is None else num_layers
        self.layers: list[Tensor] = [torch.zeros(shape, dtype=dtype) for _ in range(count)]
        self.num_blocks = num_blocks
        self.dtype = dtype

    def write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """slots: int64 [N] (block * BLOCK_SIZE + offset), rows: [N, latent_dim]."""
        self.layers[layer].view(-1, rows.shape[-1]).index_copy_(0, slots, rows)

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return config.num_hidden_layers * BLOCK_SIZE * config.latent_dim * dtype.itemsize


class BlockAllocator:
    """Hands out block ids; lowest first, so that runs are repeatable."""

    def __init__(self, num_blocks: int) -> None:
        self.num_total = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert count >= 0, f"cannot allocate {count} blocks"
        if count > len(self._free):
            raise OutOfBlocks(f"{count} KV blocks wanted, {len(self._free)} of {self.num_total} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = False
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert not self._is_free[block], f"KV block {block} freed twice"
            self._is_free[block] = True
            self._free.append(block)


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
