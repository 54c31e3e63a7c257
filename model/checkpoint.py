"""Opens a Hugging Face checkpoint directory: config, index and shard headers now, tensors when they are asked for."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.quant import BlockFp8, dequantise, scale_shape
from .config import ModelConfig
from .safetensors_file import CheckpointError, TensorSpec, map_rows, read_header
from .tensor_names import ALL_ROLES, Role, expected_tensors, mtp_copies, mtp_layers, optional_tensors
from .to_device import fill

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
WEIGHT_DTYPES = ("F32", "BF16", "F16", "F8_E4M3")
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
WINDOW_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of one tensor as they lie in the file, with the block scales of these rows if it is fp8."""

    start: int
    values: Tensor
    scale: Tensor | None
    block: tuple[int, int]

    @property
    def stop(self) -> int:
        return self.start + (self.values.shape[0] if self.values.dim() else 1)

    def copy_to(self, out: Tensor) -> Tensor:
        """As floats: out has the shape of the rows, and any float dtype."""
        if self.scale is None:
            return out.copy_(self.values)
        return dequantise(self.values, self.scale, out, self.block)

    def copy_codes_to(self, out: Tensor) -> Tensor:
        """As they are stored: out has the shape and the dtype of the rows."""
        return out.copy_(self.values)

    def copy_scales_to(self, out: Tensor) -> Tensor:
        """out: fp32 [row blocks, column blocks]."""
        assert self.scale is not None, "a window of floats has no scales"
        return out.copy_(self.scale)


class Checkpoint:
    """Reads tensors by name as floats, block fp8 dequantised on the way or as it is. `names_read` records what was."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = _read_config(self.path)
        quantization = self.config.quantization
        self.block = (128, 128) if quantization is None else quantization.weight_block_size
        weight_map = _read_weight_map(self.path)
        self.shards = _shard_paths(self.path, weight_map)
        self._specs: dict[str, TensorSpec] = {}
        for shard in self.shards:
            self._specs.update(read_header(shard).tensors)
        _check_index(self.path, weight_map, self._specs)
        self._names_read: set[str] = set()

    def names(self) -> list[str]:
        return list(self._specs)

    @property
    def names_read(self) -> frozenset[str]:
        return frozenset(self._names_read)

    def spec(self, name: str) -> TensorSpec:
        """Raises CheckpointError where there is no such tensor."""
        if name not in self._specs:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r} in its {len(self.shards)} safetensors files: "
                "the checkpoint is incomplete, or its config.json belongs to another model"
            )
        return self._specs[name]

    def scale_spec(self, name: str) -> TensorSpec | None:
        """The block scales of an fp8 weight; None for a tensor of another dtype."""
        spec = self.spec(name)
        if spec.dtype != "F8_E4M3":
            return None
        if not self.has(name + SCALE_SUFFIX):
            raise CheckpointError(
                f"{spec.path}: {name!r} is fp8 but the checkpoint lacks its scales {name + SCALE_SUFFIX!r}: "
                "download the files again, or take the BF16 checkpoint"
            )
        return self.spec(name + SCALE_SUFFIX)

    def has(self, name: str) -> bool:
        return name in self._specs

    def check(self, config: ModelConfig, roles: Collection[Role] = ALL_ROLES) -> None:
        """Compares the headers with what the network needs: cheap, and done before a byte of a weight is read."""
        expected = expected_tensors(config, roles)
        for name in self._left_out(config):
            expected.pop(name, None)
        problems = [problem for name, shape in expected.items() if (problem := self._problem(name, shape))]
        if problems:
            more = f" (and {len(problems) - 1} more tensors are wrong)" if len(problems) > 1 else ""
            raise CheckpointError(problems[0] + more)

    def has_mtp(self, config: ModelConfig) -> bool:
        """Whether the MTP module that serving drafts with is here; many checkpoints leave it out."""
        return bool(mtp_layers(config)) and self.has(f"model.layers.{config.num_hidden_layers}.eh_proj.weight")

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of its own, not a view of the file."""
        return self.read_into(name, torch.empty(self.spec(name).shape, dtype=dtype))

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Fills `out`, which may be a slice of a larger tensor on any device, converting to its dtype by windows."""
        spec = self.spec(name)
        if tuple(out.shape) != spec.shape:
            raise CheckpointError(_wrong_shape(spec, tuple(out.shape)))
        for window in self.windows(name):
            fill(out[window.start : window.stop] if spec.shape else out, window.copy_to)
        return out

    def read_fp8_into(self, name: str, out: BlockFp8) -> None:
        """Fills `out`, which may be a slice of larger tensors, with the codes and scales as they are."""
        spec = self.spec(name)
        if tuple(out.codes.shape) != spec.shape:
            raise CheckpointError(_wrong_shape(spec, tuple(out.codes.shape)))
        for window in self.windows(name):
            fill(out.codes[window.start : window.stop], window.copy_codes_to)
            fill(
                out.scales[window.start // self.block[0] : -(-window.stop // self.block[0])],
                window.copy_scales_to,
            )

    def windows(self, name: str, row_multiple: int = 1) -> Iterator[Window]:
        """The tensor in order, some MB at a time, cut at multiples of `row_multiple` rows (and of the fp8 block)."""
        spec, scale_spec = self.spec(name), self.scale_spec(name)
        self._names_read.add(name)
        scale = None
        if scale_spec is not None:
            row_multiple = math.lcm(row_multiple, self.block[0])
            self._names_read.add(scale_spec.name)
            scale = map_rows(scale_spec, 0, scale_spec.num_rows).to(torch.float32)
        step = max(1, WINDOW_BYTES // max(1, spec.row_bytes * row_multiple)) * row_multiple
        for start in range(0, spec.num_rows, step):
            stop = min(start + step, spec.num_rows)
            rows = None if scale is None else scale[start // self.block[0] : -(-stop // self.block[0])]
            yield Window(start, map_rows(spec, start, stop), rows, self.block)

    def _left_out(self, config: ModelConfig) -> Iterator[str]:
        """An MTP module may be absent as a whole, or lack the copies of the main embedding and head."""
        copies = mtp_copies(config)
        for layer in mtp_layers(config):
            prefix = f"model.layers.{layer}."
            has_module = self.has(prefix + "eh_proj.weight")
            for name in optional_tensors(config):
                if name.startswith(prefix) and (not has_module or (name in copies and not self.has(name))):
                    yield name

    def _problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        try:
            spec, scale_spec = self.spec(name), self.scale_spec(name)
        except CheckpointError as error:
            return str(error)
        if spec.dtype not in WEIGHT_DTYPES:
            return (
                f"{spec.path}: {name!r} is {spec.dtype}, expected one of {', '.join(WEIGHT_DTYPES)}: convert it first"
            )
        if spec.shape != shape:
            return _wrong_shape(spec, shape)
        return None if scale_spec is None else _scale_problem(spec, scale_spec, self.block)


def _wrong_shape(spec: TensorSpec, expected: tuple[int, ...]) -> str:
    return (
        f"{spec.path}: {spec.name!r} has shape {list(spec.shape)}, config.json asks for {list(expected)}: "
        "weights and config.json belong to different models"
    )


def _scale_problem(spec: TensorSpec, scale: TensorSpec, block: tuple[int, int]) -> str | None:
    if len(spec.shape) != 2:
        return (
            f"{spec.path}: {spec.name!r} is fp8 with shape {list(spec.shape)}; only matrices can be: convert it first"
        )
    if scale.dtype not in SCALE_DTYPES:
        return f"{scale.path}: {scale.name!r} is {scale.dtype}, expected one of {', '.join(SCALE_DTYPES)}"
    expected = scale_shape(spec.shape, block)
    if scale.shape != expected:
        return (
            f"{scale.path}: {scale.name!r} has shape {list(scale.shape)}, a weight of {list(spec.shape)} in blocks of "
            f"{block[0]}x{block[1]} needs {list(expected)}: check weight_block_size in config.json"
        )
    return None


def _read_config(path: Path) -> ModelConfig:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory: give the folder that holds config.json and the safetensors files"
        )
    try:
        return ModelConfig.from_path(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _read_weight_map(path: Path) -> dict[str, str] | None:
    index = path / INDEX_NAME
    if not index.exists():
        return None
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(Path(file).name == file for file in set(weight_map.values())):
            raise ValueError("weight_map must map tensor names to file names in the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}): download it again") from error
    return dict(weight_map)


def _shard_paths(path: Path, weight_map: Mapping[str, str] | None) -> tuple[Path, ...]:
    if weight_map is None:
        found = [path / SINGLE_NAME] if (path / SINGLE_NAME).exists() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path} holds {len(found)} safetensors files and no {INDEX_NAME}: download the checkpoint's "
                "safetensors files and its index (pickled .bin weights are not read)"
            )
        return tuple(found)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        name = next(name for name, file in weight_map.items() if file == missing[0])
        raise CheckpointError(
            f"{path / INDEX_NAME} names {missing[0]} (for {name!r}), which is not there; {len(missing)} of "
            f"{len(files)} files are missing: download them again"
        )
    return tuple(path / file for file in files)


def _check_index(path: Path, weight_map: Mapping[str, str] | None, specs: Mapping[str, TensorSpec]) -> None:
    for name, file in (weight_map or {}).items():
        if name not in specs or specs[name].path.name != file:
            found = f"is in {specs[name].path.name}" if name in specs else "is in no file"
            raise CheckpointError(
                f"{path / INDEX_NAME} puts {name!r} into {file}, but it {found}: "
                "index and files are of different versions, download both again"
            )
