"""Turns an fp8 checkpoint into BF16 and back, file by file in bounded memory; an interrupted run goes on where it was.

A finished file is known by its name, its header and the fingerprint of its source in the header's metadata, so there
is no journal that could disagree with the files.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..kernels.quant import BLOCK, ScaleFormat, quantise, scale_shape
from .checkpoint import INDEX_NAME, SCALE_SUFFIX, Checkpoint, Window
from .safetensors_file import DTYPES, CheckpointError, TensorSpec, read_header
from .shard_writer import PARTIAL_SUFFIX, Planned, ShardWriter, is_finished
from .tensor_names import is_quantised_in_fp8

Target = Literal["bfloat16", "fp8"]
Progress = Callable[[int, int, str], None]  # bytes of the source done, bytes in all, the file at hand
FLOATS = ("F32", "F16", "BF16")
# Weights in other formats would be stale beside the converted ones.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", PARTIAL_SUFFIX)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    path: Path
    tensors: tuple[TensorSpec, ...]  # of the source, in its order
    planned: tuple[Planned, ...]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)


def convert(
    src: Path, dst: Path, target: str, progress: Progress | None = None, scale_format: ScaleFormat = "float32"
) -> None:
    """Writes `src` to the folder `dst` as BF16 or as block fp8, with all its other files."""
    if target not in get_args(Target):
        raise ValueError(f"target {target!r} is unknown: give one of {', '.join(get_args(Target))}")
    checkpoint = Checkpoint(src)
    checkpoint.check(checkpoint.config)
    plans = _plan_shards(checkpoint, Path(dst), target, scale_format)
    _check_destination(checkpoint, Path(dst), plans, target)
    _copy_other_files(checkpoint.path, Path(dst))
    report, done, total = progress or _no_progress, 0, sum(plan.num_bytes for plan in plans)
    for plan in plans:
        if not is_finished(plan.path, plan.planned, plan.metadata):
            for num_bytes in _convert_shard(checkpoint, plan, scale_format):
                report(done + num_bytes, total, plan.path.name)
        done += plan.num_bytes
        report(done, total, plan.path.name)
    _write_index(checkpoint, Path(dst), plans)
    # Last of all: without config.json nothing takes the folder for a checkpoint.
    _write_config(checkpoint, Path(dst), target, scale_format)


def _no_progress(done: int, total: int, file: str) -> None:
    pass


def _plan_shards(checkpoint: Checkpoint, dst: Path, target: str, scale_format: ScaleFormat) -> list[ShardPlan]:
    tensors: dict[Path, list[TensorSpec]] = {shard: [] for shard in checkpoint.shards}
    for spec in map(checkpoint.spec, checkpoint.names()):
        tensors[spec.path].append(spec)
    plans = []
    for shard, specs in tensors.items():
        planned = tuple(tensor for spec in specs for tensor in _planned(checkpoint, spec, target))
        if planned:  # a file of nothing but scales is empty afterwards
            metadata = {"format": "pt", "converted_from": _fingerprint(shard, specs, target, scale_format)}
            plans.append(ShardPlan(dst / shard.name, tuple(specs), planned, metadata))
    return plans


def _fingerprint(shard: Path, specs: list[TensorSpec], target: str, scale_format: ScaleFormat) -> str:
    status = shard.stat()
    identity = [target, scale_format, shard.name, status.st_size, status.st_mtime_ns]
    identity += [[spec.name, spec.dtype, spec.shape, spec.begin] for spec in specs]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _planned(checkpoint: Checkpoint, spec: TensorSpec, target: str) -> Iterator[Planned]:
    if spec.name.endswith(SCALE_SUFFIX) and target == "bfloat16":
        return
    dtype = _target_dtype(spec, target)
    yield Planned(spec.name, dtype, spec.shape)
    if dtype == "F8_E4M3" and spec.dtype != dtype:
        yield Planned(spec.name + SCALE_SUFFIX, "F32", scale_shape(spec.shape, _target_block(checkpoint)))


def _target_dtype(spec: TensorSpec, target: str) -> str:
    if spec.dtype not in DTYPES:
        raise CheckpointError(
            f"{spec.path}: {spec.name!r} is {spec.dtype}, which cannot be converted: remove this tensor"
        )
    is_kept = spec.name.endswith(("e_score_correction_bias", SCALE_SUFFIX))
    if spec.dtype == "F8_E4M3":
        return "BF16" if target == "bfloat16" else spec.dtype
    if is_kept or spec.dtype not in FLOATS:
        return spec.dtype
    return "F8_E4M3" if target == "fp8" and is_quantised_in_fp8(spec.name) else "BF16"


def _target_block(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.block if checkpoint.config.quantization is not None else BLOCK


def _check_destination(checkpoint: Checkpoint, dst: Path, plans: list[ShardPlan], target: str) -> None:
    source = checkpoint.path.resolve()
    if dst.resolve() == source or source in dst.resolve().parents:
        raise ValueError(f"{dst} is the checkpoint's own folder or lies in it: choose a folder elsewhere")
    same = all(
        tuple((t.name, t.dtype) for t in plan.planned) == tuple((s.name, s.dtype) for s in plan.tensors)
        for plan in plans
    )
    if same and len(plans) == len(checkpoint.shards):
        raise ValueError(f"{checkpoint.path} is {target} already: there is nothing to convert")
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"{dst} is a file: choose a folder, which need not exist yet")
    dst.mkdir(parents=True, exist_ok=True)
    ours = {plan.path.name for plan in plans}
    foreign = [path for path in sorted(dst.glob("*.safetensors")) if path.name not in ours or not _is_converted(path)]
    if foreign:
        raise ValueError(f"{dst} holds {foreign[0].name}, which is not of this conversion: choose an empty folder")
    missing = [plan for plan in plans if not is_finished(plan.path, plan.planned, plan.metadata)]
    needed = sum(tensor.num_bytes for plan in missing for tensor in plan.planned)
    free = shutil.disk_usage(dst).free
    if needed > free:
        raise ValueError(
            f"{dst} needs {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB: free some space"
        )


def _is_converted(path: Path) -> bool:
    """Weights that no conversion wrote are never written over: they may be the only copy."""
    try:
        return "converted_from" in read_header(path).metadata
    except CheckpointError:
        return False


def _convert_shard(checkpoint: Checkpoint, plan: ShardPlan, scale_format: ScaleFormat) -> Iterator[int]:
    """Yields the bytes of the source that are done."""
    dtypes = {tensor.name: tensor.dtype for tensor in plan.planned}
    done = 0
    with ShardWriter(plan.path, plan.planned, plan.metadata) as shard:
        for spec in plan.tensors:
            dtype = dtypes.get(spec.name)
            block = _target_block(checkpoint)
            for window in checkpoint.windows(spec.name, block[0]) if dtype else ():
                _convert_window(shard, spec, window, dtype or "", scale_format, block)
                yield done + spec.row_bytes * window.stop
            done += spec.num_bytes


def _convert_window(
    shard: ShardWriter, spec: TensorSpec, window: Window, dtype: str, scale_format: ScaleFormat, block: tuple[int, int]
) -> None:
    if dtype == spec.dtype:
        shard.write(spec.name, window.values)
    elif dtype == "F8_E4M3":
        try:
            codes, scale = quantise(window.values, scale_format, block)
        except ValueError as error:
            raise CheckpointError(f"{spec.path}: {spec.name!r}: {error}") from error
        shard.write(spec.name, codes)
        shard.write(spec.name + SCALE_SUFFIX, scale)
    else:
        shard.write(spec.name, window.copy_to(torch.empty(window.values.shape, dtype=DTYPES[dtype])))


def _copy_other_files(src: Path, dst: Path) -> None:
    """Tokenizer, templates, licences and whatever else came with the weights."""
    for path in sorted(src.rglob("*")):
        relative = path.relative_to(src)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if is_hidden or not path.is_file() or path.suffix in NOT_COPIED:
            continue
        if path.name.endswith(".index.json") or relative == Path("config.json"):
            continue
        (dst / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, dst / relative)


def _write_index(checkpoint: Checkpoint, dst: Path, plans: list[ShardPlan]) -> None:
    if not (checkpoint.path / INDEX_NAME).exists():
        return
    total_size = sum(tensor.num_bytes for plan in plans for tensor in plan.planned)
    weight_map = {tensor.name: plan.path.name for plan in plans for tensor in plan.planned}
    _write_json(dst / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_config(checkpoint: Checkpoint, dst: Path, target: str, scale_format: ScaleFormat) -> None:
    values = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    values["dtype" if "dtype" in values else "torch_dtype"] = "bfloat16"
    quantization = values.pop("quantization_config", None)
    if target == "fp8":
        scale_fmt = {"scale_fmt": "ue8m0"} if scale_format == "ue8m0" else {}
        values["quantization_config"] = quantization or {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(BLOCK),
            **scale_fmt,
        }
    _write_json(dst / "config.json", values)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
