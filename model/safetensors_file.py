"""Reads one safetensors file: its header checked against the file, its tensors mapped a window of rows at a time.

A window is mapped, used and unmapped. A whole mapped shard would count as the process's memory as soon as it has been
read, and loading would need the weights twice.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit; a longer header means that the first eight bytes are not a length.
MAX_HEADER_BYTES = 100_000_000


class CheckpointError(ValueError):
    """The checkpoint on disk is not what it says it is; the message names the file, the tensor and the remedy."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies: `begin` and `end` count bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // max(self.num_rows, 1)


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]


def read_header(path: Path) -> Header:
    """Every tensor the file announces, each checked to lie within the file and to be as long as its shape says."""
    raw, data_start = _raw_header(path)
    metadata = raw.pop("__metadata__", {})
    tensors = {name: _tensor_spec(path, name, entry, data_start) for name, entry in raw.items()}
    file_size = path.stat().st_size
    last = max(tensors.values(), key=lambda spec: spec.end, default=None)
    if last is not None and last.end > file_size:
        raise CheckpointError(
            f"{path} is truncated: {last.name!r} ends at byte {last.end:,}, the file at byte {file_size:,}: "
            "copy or download this file again"
        )
    return Header(metadata, tensors)


def map_rows(spec: TensorSpec, start: int, stop: int) -> Tensor:
    """Rows [start, stop) as a view of the mapped file, unmapped when the last view of it goes."""
    shape = (stop - start, *spec.row_shape) if spec.shape else ()
    dtype = DTYPES[spec.dtype]
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    begin, length = spec.begin + start * spec.row_bytes, (stop - start) * spec.row_bytes
    offset = begin % mmap.ALLOCATIONGRANULARITY
    try:
        with spec.path.open("rb") as file:
            # A private copy-on-write mapping: nothing is ever written, but torch wants a writable buffer.
            window = mmap.mmap(file.fileno(), length + offset, access=mmap.ACCESS_COPY, offset=begin - offset)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{spec.path}: cannot read {spec.name!r} ({error}); has the file changed?") from error
    return torch.frombuffer(window, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            file_size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if file_size < 8 or length > min(file_size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: it has {file_size:,} bytes and claims a header of "
                    f"{length:,}: copy or download this file again (a few hundred bytes may be a Git LFS pointer)"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the header of {path} is not JSON ({error}): copy or download this file again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object: copy or download this file again")
    return header, 8 + length


def _tensor_spec(path: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        well_formed = 0 <= begin <= end and all(isinstance(size, int) and size >= 0 for size in shape)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(
            f"{path}: the header's entry for {name!r} is malformed: {entry!r}: download the file again"
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: {name!r} ({dtype} {list(shape)}) needs {expected:,} bytes, its header gives it {end - begin:,}: "
            "the file is damaged, download it again"
        )
    return TensorSpec(name, dtype, shape, path, data_start + begin, data_start + end)
