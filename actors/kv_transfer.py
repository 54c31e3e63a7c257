"""What both ends of a KV transfer know: a prompt's latent rows go from a prefill worker to a decode worker.

KV_OPEN reserves blocks at the decode worker and is sent when the prompt is queued; KV_ACCEPTED says how many leading
positions it holds already, from an earlier prompt with the same beginning; KV_LAYER carries one layer's rows of some
positions, those of a chunk as soon as that layer has run; KV_DONE follows the last of them with the first token, and
starts decoding; KV_ABORT frees. The prefill worker's end is handovers.py and kv_sender.py, the other kv_receiver.py.

Rows go from the cache's memory straight into the link, block by block, and from the message into the other cache: the
blocks of a sequence are few and large, so that there is nothing to gather.
"""

from __future__ import annotations

import zlib
from typing import Any

from ..model.kv_cache import BLOCK_SIZE
from ..model.sampling_params import SamplingParams
from .cache_memory import Runs
from .messages import pack, unpack
from .sequence import Sequence


def runs(block_table: list[int], start: int, num: int) -> Runs:
    """Where positions [start, start + num) lie in a layer seen as [num_blocks * BLOCK_SIZE, latent_dim].

    Pairs of first row and number of rows, in the order of the positions; neighbours are joined.
    """
    found: Runs = []
    position, end = start, start + num
    while position < end:
        offset = position % BLOCK_SIZE
        count = min(BLOCK_SIZE - offset, end - position)
        row = block_table[position // BLOCK_SIZE] * BLOCK_SIZE + offset
        if found and sum(found[-1]) == row:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((row, count))
        position += count
    return found


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
            "priority": sequence.priority,
            "caller": sequence.caller,
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
        priority=body["priority"],
        caller=body["caller"],
    )


def checksum_of(pieces: list[memoryview]) -> int:
    """CRC-32 of the pieces one after the other; 1 to 3 GB/s."""
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum
