"""Hands the latent KV cache of a prompt from a prefill worker to a decode worker, layer by layer, while it is computed.

KV_OPEN reserves blocks at the decode worker and is sent when the prompt is queued; KV_LAYER carries one layer's rows of
one chunk as soon as that layer has run; KV_DONE carries the first token and starts decoding; KV_ABORT frees.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from ..model.kv_cache import BLOCK_SIZE, LatentCache
from ..model.sampling_params import SamplingParams
from .links import Link, LinkClosed, LinkFull, Message
from .messages import KV_LAYER, Kind, pack, unpack
from .scheduler import Chunk
from .sequence import Sequence
from .wire import bytes_of, rows_from

log = logging.getLogger(__name__)


def slots(sequence: Sequence, start: int, num: int) -> Tensor:
    """Places of positions [start, start + num) in a layer's cache seen as [num_blocks * BLOCK_SIZE, latent_dim]."""
    positions = torch.arange(start, start + num)
    blocks = torch.tensor(sequence.block_table, dtype=torch.int64)
    return blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def open_message(sequence: Sequence) -> bytes:
    """Everything the decode worker needs to go on with the sequence later."""
    return pack(
        {
            "number": sequence.number,
            "id": sequence.id,
            "front": sequence.front,
            "prompt": sequence.tokens[: sequence.num_prompt],
            "params": sequence.params.to_wire(),
            "carrier": sequence.carrier,
            "deadline": sequence.deadline,
        }
    )


def sequence_from_open(meta: bytes, source: str) -> Sequence:
    body: dict[str, Any] = unpack(meta)
    return Sequence(
        id=body["id"],
        front=body["front"],
        target="",
        tokens=body["prompt"],
        num_prompt=len(body["prompt"]),
        params=SamplingParams.from_wire(body["params"]),
        carrier=body["carrier"],
        deadline=body["deadline"],
        number=body["number"],
        source=source,
    )


class LayerSender:
    """The forward pass's `on_layer` hook: ships the layer's new rows of every chunk that is bound elsewhere."""

    def __init__(self, cache: LatentCache, bound: list[tuple[Chunk, Link]]) -> None:
        self._cache = cache
        self._bound = [(chunk, link, slots(chunk.sequence, chunk.start, chunk.num)) for chunk, link in bound]

    def __call__(self, layer: int) -> None:
        rows = self._cache.layers[layer].view(-1, self._cache.layers[layer].shape[-1])
        for chunk, link, places in self._bound:
            sequence = chunk.sequence
            if link.closed:
                continue  # the Closed event fails the sequence after this step
            sequence.kv_started_ns = sequence.kv_started_ns or time.time_ns()
            payload = bytes_of(rows.index_select(0, places))
            sequence.kv_bytes += payload.nbytes
            try:
                link.send(Kind.KV_LAYER, KV_LAYER.pack(layer, sequence.number, chunk.start, chunk.num), payload)
            except (LinkClosed, LinkFull) as error:  # the decode worker counts its rows and refuses to start
                log.warning("layer %d of %s not sent to %s: %s", layer, sequence.id, link.peer.name, error)


def receive_layer(cache: LatentCache, receiving: dict[tuple[str, int], Sequence], link: Link, message: Message) -> int:
    """Writes one layer's rows into the sequence's blocks; rows of a refused or cancelled sequence are dropped.

    Returns the number of bytes written.
    """
    layer, number, start, num = KV_LAYER.unpack(message.meta)
    sequence = receiving.get((link.peer.name, number))
    if sequence is None:
        return 0
    target = cache.layers[layer].view(-1, cache.layers[layer].shape[-1])
    rows = rows_from(message.payload, target.dtype, target.shape[1])
    assert len(rows) == num, f"{link.peer.name} announced {num} rows of layer {layer} and sent {len(rows)}"
    target.index_copy_(0, slots(sequence, start, num), rows)
    sequence.rows_received += num
    return message.payload.nbytes
