"""Writes one safetensors file whose tensors arrive piece by piece; the file gets its name only when it is whole."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from .safetensors_file import DTYPES, CheckpointError, read_header

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that a file is going to hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def is_finished(path: Path, planned: Iterable[Planned], metadata: Mapping[str, str]) -> bool:
    """Whether `path` is the whole file that a writer of the same plan would leave."""
    if not path.is_file():
        return False
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    found = {Planned(spec.name, spec.dtype, spec.shape) for spec in header.tensors.values()}
    return found == set(planned) and header.metadata == dict(metadata)


class ShardWriter:
    """`with ShardWriter(...) as shard: shard.write(name, piece)`; pieces of one tensor come in order."""

    def __init__(self, path: Path, planned: Iterable[Planned], metadata: Mapping[str, str]) -> None:
        self._path = path
        # Wide dtypes first, so that every tensor lies at a multiple of its own item size.
        ordered = sorted(planned, key=lambda tensor: (-DTYPES[tensor.dtype].itemsize, tensor.name))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._next: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        end = 0
        for tensor in ordered:
            begin, end = end, end + tensor.num_bytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
            self._next[tensor.name], self._missing[tensor.name] = begin, tensor.num_bytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._data_start = 8 + len(raw)
        self._file = path.with_name(path.name + PARTIAL_SUFFIX).open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, piece: Tensor) -> None:
        """The next numbers of a tensor, in its own dtype and order; its pieces may come between those of others."""
        self._file.seek(self._data_start + self._next[name])
        self._file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._next[name] += piece.nbytes
        self._missing[name] -= piece.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        partial = Path(self._file.name)
        try:
            if kind is None:
                incomplete = [name for name, num_bytes in self._missing.items() if num_bytes]
                assert not incomplete, f"{incomplete[0]} was not written as planned"
                self._file.flush()
                os.fsync(self._file.fileno())
                partial.replace(self._path)
        finally:
            self._file.close()
            partial.unlink(missing_ok=True)
