"""Rows of a cache that are sent and received: by way of pinned memory they are those that lie in it."""

from __future__ import annotations

import random

import torch
from small_models import NUM_BLOCKS, small_model

from braid.actors.cache_memory import CacheMemory, DeviceMemory, HostMemory, memory_of
from braid.actors.kv_transfer import runs
from braid.model.kv_cache import LatentCache


def made(dtype: torch.dtype, seed: int | None = None) -> LatentCache:
    """Full of numbers, or of NaN."""
    cache = LatentCache(small_model("v3").config, NUM_BLOCKS, dtype)
    for layer in cache.layers:
        if seed is None:
            layer.fill_(torch.nan)
        else:
            layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed)))
    return cache


def bits(cache: LatentCache) -> list[bytes]:
    return [layer.view(torch.uint8).numpy().tobytes() for layer in cache.layers]


def test_a_cache_of_the_host_is_read_and_written_in_place() -> None:
    assert isinstance(memory_of(made(torch.float32)), HostMemory)


def test_both_ways_bring_the_same_rows() -> None:
    rng = random.Random(5)
    for dtype in (torch.float32, torch.bfloat16):
        source = made(dtype, seed=1)
        here, there = made(dtype), made(dtype)
        readers: list[CacheMemory] = [HostMemory(source), DeviceMemory(source)]
        writers: list[CacheMemory] = [HostMemory(here), DeviceMemory(there)]
        for _ in range(20):
            table, to_table = rng.sample(range(NUM_BLOCKS), 6), rng.sample(range(NUM_BLOCKS), 6)
            start, layer = rng.randrange(6 * 64), rng.randrange(len(source.layers))
            num = rng.randrange(6 * 64 - start) + 1
            for reader, writer in zip(readers, writers, strict=True):
                assert reader.row_bytes == source.layers[0].shape[-1] * dtype.itemsize
                reading = reader.read(layer, runs(table, start, num))
                assert reading.is_there()
                payload = bytearray(b"".join(reading.pieces()))
                assert len(payload) == num * reader.row_bytes
                writer.write(layer, runs(to_table, start, num), memoryview(payload))
        assert bits(here) == bits(there)
        assert bits(here) != bits(made(dtype))


def test_what_was_read_does_not_change_with_the_cache() -> None:
    cache = made(torch.bfloat16, seed=2)
    reading = DeviceMemory(cache).read(0, [(3, 2)])
    before = cache.layers[0].flatten(0, 1)[3:5].clone()
    cache.layers[0].fill_(torch.nan)
    assert b"".join(reading.pieces()) == before.view(torch.uint8).numpy().tobytes()
