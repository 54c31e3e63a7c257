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


def test_a_published_block_serves_again_until_it_is_wanted() -> None:
    allocator = BlockAllocator(4)
    first = allocator.allocate(3)
    for block, key in zip(first, (b"a", b"ab", b"abc"), strict=True):
        allocator.publish(block, key)
    allocator.free(first)
    assert (allocator.num_free, allocator.num_idle) == (4, 3)
    second, num_shared = allocator.allocate_after([b"a", b"ab", b"abd"], 3)
    assert (second[:2], num_shared) == (first[:2], 2)
    assert second[2] not in first  # a free block is taken before an idle one is evicted
    third, num_shared = allocator.allocate_after([b"a", b"ab", b"abc"], 3)
    assert (third, num_shared, allocator.num_free) == (first, 3, 0)
    allocator.check([second, third])
    allocator.free(second)
    assert allocator.num_free == 1  # the two that are shared are still held
    allocator.free(third)
    allocator.check([])


def test_the_block_used_longest_ago_is_evicted_and_the_end_of_a_prefix_before_its_start() -> None:
    allocator = BlockAllocator(4)
    old, new = allocator.allocate(2), allocator.allocate(2)
    for block, key in zip(old + new, (b"o", b"o2", b"n", b"n2"), strict=True):
        allocator.publish(block, key)
    allocator.free(old)
    allocator.free(new)
    assert allocator.allocate_after([b"o"], 1) == (old[:1], 1)
    assert allocator.allocate(1) == [old[1]]
    assert allocator.allocate(1) == [new[1]]
    assert allocator.num_evicted == 2
    assert allocator.allocate_after([b"n", b"n2"], 1) == ([new[0]], 1)


def test_a_hit_does_not_count_as_room() -> None:
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(3)
    allocator.publish(blocks[0], b"a")
    allocator.free(blocks[:1])
    with pytest.raises(OutOfBlocks, match="1 KV blocks wanted, 1 of 3 free"):
        allocator.allocate_after([b"a"], 2)
    with pytest.raises(OutOfBlocks, match="0 KV blocks wanted, 1 of 3 free"):
        allocator.allocate_after([b"a"], 1, spare=1)
    assert (allocator.num_free, allocator.num_idle) == (1, 1)
    allocator.check([blocks[1:]])


def test_of_two_blocks_with_the_same_content_one_is_shared() -> None:
    allocator = BlockAllocator(2)
    first, second = allocator.allocate(1), allocator.allocate(1)
    for block in (*first, *second):
        allocator.publish(block, b"a")
    allocator.free(first)
    allocator.free(second)
    assert (allocator.num_free, allocator.num_idle) == (2, 1)
    assert allocator.allocate_after([b"a"], 1) == (first, 1)


def test_the_check_names_what_does_not_add_up() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    with pytest.raises(AssertionError, match="KV block 1 has 0 holders and counts 1"):
        allocator.check([blocks[:1]])


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
