"""Latent KV cache in blocks of 64 tokens, and the pure allocator that hands the blocks out."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .config import ModelConfig

BLOCK_SIZE = 64


class OutOfBlocks(Exception):
    """No room now: wait for a sequence to finish, or refuse with "busy"."""


class LatentCache:
    """`layers[i]`: [num_blocks, BLOCK_SIZE, latent_dim]: normed kv latent, then roped k_pe, one row a token."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        dtype: torch.dtype,
        num_layers: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        shape = (num_blocks, BLOCK_SIZE, config.latent_dim)
        count = config.num_hidden_layers if num_layers is None else num_layers
        self.layers: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]
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
    """Hands out block ids, lowest first so that runs are repeatable, and counts who holds each.

    A block may be published under a key that says what it holds (router/prefix_keys.py). Once nobody holds it, it stays
    as it is for whoever asks for that key, until a block is wanted and none is free: then the one that was used longest
    ago is evicted. Every block is therefore free, idle (published, held by nobody) or held, and never two of these.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_total = num_blocks
        self.num_evicted = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one used longest ago first

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        assert count >= 0, f"cannot allocate {count} blocks"
        if count > self.num_free:
            raise OutOfBlocks(f"{count} KV blocks wanted, {self.num_free} of {self.num_total} free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def allocate_after(self, keys: Sequence[bytes], count: int, spare: int = 0) -> tuple[list[int], int]:
        """`count` blocks, the first of which are those published under the first `keys`, and how many these are.

        Raises OutOfBlocks, having changed nothing, when fewer than `spare` could be had afterwards.
        """
        shared = self._published(keys)
        num_fresh = count - len(shared)
        assert num_fresh >= 0, f"{len(shared)} blocks are published and {count} wanted"
        if num_fresh + spare > self.num_free - sum(not self._holders[block] for block in shared):
            raise OutOfBlocks(f"{num_fresh} KV blocks wanted, {self.num_free} of {self.num_total} free")
        for block in shared:
            self._holders[block] += 1
            self._idle.pop(block, None)
        return shared + self.allocate(num_fresh), len(shared)

    def publish(self, block: int, key: bytes) -> None:
        """The held block is full and will not change. Of two with the same content the first one is shared."""
        assert self._holders[block], f"KV block {block} is published and nobody holds it"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def free(self, blocks: Sequence[int]) -> None:
        """Gives up one hold on each. The last ones are evicted first: without them, those before are still of use."""
        for block in reversed(blocks):
            assert self._holders[block], f"KV block {block} freed twice"
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """`held`: the blocks of everybody who holds some. Raises AssertionError naming what does not add up."""
        holders = Counter(block for blocks in held for block in blocks)
        for block in range(self.num_total):
            assert self._holders[block] == holders[block], (
                f"KV block {block} has {holders[block]} holders and counts {self._holders[block]}"
            )
        spare = sorted([*self._free, *self._idle])
        assert spare == [block for block in range(self.num_total) if not holders[block]], "KV blocks lost or held twice"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "keys and blocks differ"
        assert all(block in self._key_of for block in self._idle), "an idle KV block has no key"
        assert not any(block in self._key_of for block in self._free), "a free KV block has a key"

    def _published(self, keys: Sequence[bytes]) -> list[int]:
        found = [self._block_of.get(key) for key in keys]
        num_found = found.index(None) if None in found else len(found)
        return [block for block in found[:num_found] if block is not None]

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        self.num_evicted += 1
        return block


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
