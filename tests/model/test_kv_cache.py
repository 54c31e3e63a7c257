"""Blocks are handed out once, come back once, and hold what was written."""

from __future__ import annotations

import pytest
import torch
from generators import make_hf_model
from hypothesis import given
from hypothesis import strategies as st

from braid.model.config import ModelConfig
from braid.model.kv_cache import BLOCK_SIZE, BlockAllocator, LatentCache, OutOfBlocks, blocks_for


def test_allocate_and_free() -> None:
    allocator = BlockAllocator(5)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    allocator.free(second)
    assert (allocator.num_free, allocator.num_total) == (3, 5)
    assert sorted(allocator.allocate(3)) == sorted(second)


def test_out_of_blocks_says_the_figures_and_takes_none() -> None:
    allocator = BlockAllocator(2)
    allocator.allocate(1)
    with pytest.raises(OutOfBlocks, match="2 KV blocks wanted, 1 of 2 free"):
        allocator.allocate(2)
    assert allocator.num_free == 1
    assert allocator.allocate(0) == []


def test_double_free_is_a_bug() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="KV block 0 freed twice"):
        allocator.free(blocks)


@given(st.lists(st.integers(0, 6), max_size=40))
def test_no_block_is_held_twice(requests: list[int]) -> None:
    allocator, held = BlockAllocator(9), []
    for count in requests:
        try:
            held.append(allocator.allocate(count))
        except OutOfBlocks:
            allocator.free(held.pop(0))
        owned = [block for blocks in held for block in blocks]
        assert len(set(owned)) == len(owned) == allocator.num_total - allocator.num_free
    for blocks in held:
        allocator.free(blocks)
    assert allocator.num_free == 9


def test_cache_rows_land_in_their_slots() -> None:
    config = ModelConfig.from_dict(make_hf_model("v3")[1])
    cache = LatentCache(config, 3, torch.bfloat16)
    assert [tuple(layer.shape) for layer in cache.layers] == [(3, BLOCK_SIZE, 48)] * config.num_hidden_layers
    rows = torch.randn(2, 48).bfloat16()
    cache.write(1, torch.tensor([2 * BLOCK_SIZE + 5, 3]), rows)
    assert torch.equal(cache.layers[1][2, 5], rows[0])
    assert torch.equal(cache.layers[1][0, 3], rows[1])
    assert int((cache.layers[1] != 0).any(-1).sum()) == 2
    assert not cache.layers[0].any()
    assert LatentCache.block_bytes(config, torch.bfloat16) == 3 * BLOCK_SIZE * 48 * 2


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks
