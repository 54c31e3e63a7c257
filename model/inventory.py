"""Says what a checkpoint, or a bare config.json, is made of: parameters, bytes a role, cache bytes, licences."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..kernels.quant import scale_shape
from .checkpoint import Checkpoint
from .config import ModelConfig
from .licences import Licences, find_licences
from .parameter_counts import (
    EMBEDDING,
    MtpCount,
    Part,
    Stored,
    count,
    count_mtp,
    count_parts,
    count_stored,
    tensors_of,
)
from .tensor_names import expert_tensors, is_quantised_in_fp8, mtp_copies, mtp_layers

WorkerRole = Literal["attention", "expert"]


@dataclass(frozen=True, slots=True)
class OnDisk:
    num_bytes: tuple[tuple[str, int], ...]  # element type, bytes
    has_mtp: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    path: Path
    config: ModelConfig
    parts: tuple[Part, ...]  # of the main model
    mtp: MtpCount
    stored: tuple[Stored, ...]
    latent_bytes: int  # of bfloat16 latent cache a token
    on_disk: OnDisk | None  # None for a bare config.json
    licences: Licences

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def activated(self) -> int:
        """With the output head and the one row of the embedding that a token looks up."""
        return sum(part.activated for part in self.parts)

    @property
    def activated_with_whole_embedding(self) -> int:
        return sum(part.total if part.name == EMBEDDING else part.activated for part in self.parts)


def describe(path: Path) -> Inventory:
    """`path` is a checkpoint's folder, whose files are checked on the way, or a bare config.json."""
    config = ModelConfig.from_path(path)
    return Inventory(
        path=path,
        config=config,
        parts=count_parts(config),
        mtp=count_mtp(config),
        stored=count_stored(config),
        latent_bytes=config.num_hidden_layers * config.latent_dim * torch.bfloat16.itemsize,
        on_disk=_on_disk(path, config),
        licences=find_licences(path if path.is_dir() else path.parent),
    )


def bytes_for_role(
    config: ModelConfig,
    dtype: torch.dtype,
    role: WorkerRole,
    expert_ids: Collection[int] = (),
    has_mtp: bool = False,
    keeps_fp8: bool = False,
) -> int:
    """Resident weights of a worker; an attention worker with `expert_ids` holds these experts too (colocated).

    `keeps_fp8`: whether its kernels read what an FP8 checkpoint holds in FP8 as it is.
    """
    shapes = tensors_of(config, "attention") if role == "attention" else {}
    if has_mtp and role == "attention":
        modules, copies = tensors_of(config, "mtp").items(), mtp_copies(config)
        shapes |= {name: shape for name, shape in modules if ".mlp.experts." not in name and name not in copies}
    for layer in range(config.num_hidden_layers + has_mtp):
        shapes |= expert_tensors(config, layer, expert_ids)
    # The gate decides in fp32 whatever the rest is in.
    gates = sum(math.prod(shape) for name, shape in shapes.items() if ".mlp.gate." in name)
    # Each form of attention has kv_b_proj in a layout of its own.
    twice = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("kv_b_proj.weight"))
    whole = (count(shapes) - gates + twice) * dtype.itemsize + gates * torch.float32.itemsize
    if not (keeps_fp8 and config.quantization):
        return whole
    kept = [shape for name, shape in shapes.items() if is_quantised_in_fp8(name) and "kv_b_proj" not in name]
    scales = sum(math.prod(scale_shape(shape)) for shape in kept)
    return whole - sum(map(math.prod, kept)) * (dtype.itemsize - 1) + scales * torch.float32.itemsize


def check_memory(needed: int, available: int) -> None:
    """Says before loading what would fail while loading."""
    if needed > available:
        raise ValueError(
            f"needs {_size(needed)} for the weights, {_size(available)} of memory available: load as bfloat16 "
            "if it is float32, put fewer workers or replicas on this machine, or spread them over more machines"
        )


def render(inventory: Inventory) -> RenderableType:
    config, mtp = inventory.config, inventory.mtp
    architecture = (config.architectures or (config.model_type,))[0]
    lines = [
        f"{_count(inventory.total)} parameters, {_count(inventory.activated)} activated a token "
        f"({_count(inventory.activated_with_whole_embedding)} counting the whole embedding table)",
        f"{inventory.latent_bytes:,} bytes of bfloat16 latent cache a token "
        f"({config.num_hidden_layers} layers x {config.latent_dim} x 2)",
        f"licence files: {', '.join(inventory.licences.files) or 'none found'}",
    ]
    if mtp.unique:
        lines.insert(1, f"{_count(mtp.unique)} unique in the MTP module, {_count(mtp.in_layers)} in its decoder layer")
    if inventory.on_disk is not None:
        sizes = ", ".join(f"{_size(num_bytes)} {dtype}" for dtype, num_bytes in inventory.on_disk.num_bytes)
        without = "" if inventory.on_disk.has_mtp or not mtp.unique else ", without the MTP module"
        lines.insert(-1, f"on disk: {sizes}{without}; every tensor has the right shape")
    notices = [Text(notice, style="bold yellow") for notice in inventory.licences.notices]
    title = Text(f"{architecture}, {inventory.path}", style="bold")
    return Group(title, _parts_table(inventory), _bytes_table(inventory), *lines, *notices)


def _parts_table(inventory: Inventory) -> Table:
    table = Table(title="Parameters")
    table.add_column("part")
    for column in ("total", "activated a token"):
        table.add_column(column, justify="right")
    for part in inventory.parts:
        table.add_row(part.name, _count(part.total), _count(part.activated))
    table.add_section()
    table.add_row("all", _count(inventory.total), _count(inventory.activated))
    return table


def _bytes_table(inventory: Inventory) -> Table:
    table = Table(title="Bytes of weights")
    table.add_column("role")
    for column in ("float32", "bfloat16", "fp8 on disk"):
        table.add_column(column, justify="right")
    for row in inventory.stored:
        table.add_row(row.name, _size(row.float32), _size(row.bfloat16), _size(row.fp8))
    return table


def _count(number: int) -> str:
    return _scaled(number, ("", "k", "M", "B", "T"))


def _size(num_bytes: int) -> str:
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """Three digits or so: 7.17k, 44.0M, 671B."""
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{units[power]}"


def _on_disk(path: Path, config: ModelConfig) -> OnDisk | None:
    if not path.is_dir() or not (any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))):
        return None
    checkpoint = Checkpoint(path)
    checkpoint.check(config)
    sizes: dict[str, int] = {}
    for spec in map(checkpoint.spec, checkpoint.names()):
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
    has_mtp = any(checkpoint.has(f"model.layers.{layer}.eh_proj.weight") for layer in mtp_layers(config))
    return OnDisk(tuple(sorted(sizes.items(), key=lambda item: -item[1])), has_mtp)
