"""ClusterSpec: everything a user may set, in one frozen tree parsed once at the edge."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..actors.settings import Dtype
from ..actors.view import Transport
from .errors import SpecError
from .spec_parser import parse, read_yaml

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
BUNDLED = "bundled"
LEAST_GPUS = 0.01


@dataclass(frozen=True, slots=True)
class ModelSpec:
    path: str = BUNDLED
    dtype: Dtype = "auto"
    served_name: str | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Attention workers of one role. `cpus` and `gpus` are what Ray reserves for each; labels choose its nodes.

    A worker uses one GPU; with a share of one, several workers use the same.
    """

    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    strategy: Strategy = "PACK"
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExpertPool:
    """`workers` is 0 exactly when the experts are colocated with attention."""

    workers: int = 2
    colocated: bool = False
    replicas: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    strategy: Strategy = "PACK"
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """`kv_tokens` and `max_model_len` are computed from memory and from the checkpoint when not given.

    `kv_checksums`: rows of the KV cache that go to another worker are checked there, at about 0.5 ns a byte.
    `speculation`: a checkpoint's MTP module drafts tokens where that pays; no answer depends on it.
    """

    max_sequences: int = 64
    max_batch_tokens: int = 2048
    kv_tokens: int | None = None
    max_model_len: int | None = None
    kv_checksums: bool = False
    speculation: bool = True


@dataclass(frozen=True, slots=True)
class FrontEndSpec:
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 9000
    max_waiting: int = 256
    request_timeout_s: float = 600.0
    max_body_mb: float = 8.0


@dataclass(frozen=True, slots=True)
class Security:
    """Without a secret file every cluster draws its own secret; without an API key file anyone on `host` may ask."""

    secret_file: str | None = None
    api_key_file: str | None = None


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    name: str = "braid"
    ray_address: str | None = None
    transport: Transport = "auto"
    model: ModelSpec = field(default_factory=ModelSpec)
    prefill: Pool = field(default_factory=Pool)
    decode: Pool = field(default_factory=Pool)
    experts: ExpertPool = field(default_factory=ExpertPool)
    engine: EngineLimits = field(default_factory=EngineLimits)
    front_end: FrontEndSpec = field(default_factory=FrontEndSpec)
    security: Security = field(default_factory=Security)

    @property
    def served_name(self) -> str:
        if self.model.served_name is not None:
            return self.model.served_name
        return "braid-tiny" if self.model.path == BUNDLED else Path(self.model.path).name

    @property
    def num_workers(self) -> int:
        return self.prefill.workers + self.decode.workers + self.experts.workers

    @property
    def pools(self) -> dict[str, Pool | ExpertPool]:
        """Those that have workers, by their key."""
        pools: dict[str, Pool | ExpertPool] = {"prefill": self.prefill, "decode": self.decode, "experts": self.experts}
        return {name: pool for name, pool in pools.items() if pool.workers > 0}

    @property
    def uses_gpus(self) -> bool:
        return any(pool.gpus > 0 for pool in self.pools.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_spec(path: Path | None, overrides: Mapping[str, Any]) -> ClusterSpec:
    """The spec in a YAML file (or the defaults), with command-line flags laid over it."""
    data: dict[str, Any] = {}
    if path is not None:
        data = _resolved(read_yaml(_read(path), str(path)), path.resolve().parent)
    return from_dict(overlay(data, overrides))


def from_dict(data: Mapping[str, Any]) -> ClusterSpec:
    raw = dict(data)
    if "experts" in raw:
        raw["experts"] = _experts(raw["experts"])
    spec = parse(ClusterSpec, raw)
    for problem in problems(spec):
        raise SpecError(problem)
    return spec


def overlay(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` wins, key by key; choosing an expert layout takes the other layout's words away."""
    merged = dict(data)
    for key, value in overrides.items():
        below = merged.get(key)
        if key == "experts" and isinstance(below, Mapping):
            below = {name: kept for name, kept in below.items() if name not in ("workers", "colocated")}
        merged[key] = overlay(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def problems(spec: ClusterSpec) -> Iterator[str]:
    """Everything impossible about a well-typed spec, worst first."""
    yield from _name_problems(spec)
    yield from _pool_problems(spec)
    yield from _gpu_problems(spec)
    yield from _engine_problems(spec.engine)
    yield from _front_end_problems(spec.front_end)


def _name_problems(spec: ClusterSpec) -> Iterator[str]:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?", spec.name):
        yield f"name: {spec.name!r} must be 1 to 30 lower-case letters, digits and inner dashes, such as 'braid-2'"
    if spec.served_name.strip() == "":
        yield "model.served_name: must not be empty; leave it out to serve under the folder's name"


def _pool_problems(spec: ClusterSpec) -> Iterator[str]:
    if spec.decode.workers < 1:
        yield f"decode.workers: {spec.decode.workers} leaves nobody to decode; set it to at least 1"
    if spec.prefill.workers < 0:
        yield f"prefill.workers: {spec.prefill.workers} is negative; 0 lets the decode workers prefill too"
    experts = spec.experts
    if not experts.colocated and experts.workers < 1:
        yield f"experts.workers: {experts.workers} leaves nobody to hold them; set at least 1, or colocated: true"
    if not experts.colocated and not 1 <= experts.replicas <= experts.workers:
        yield (
            f"experts.replicas: {experts.replicas} copies of each expert need as many expert workers, "
            f"and experts.workers is {experts.workers}"
        )
    for name, pool in (("prefill", spec.prefill), ("decode", spec.decode), ("experts", experts)):
        if not (pool.cpus > 0 and math.isfinite(pool.cpus)):
            yield f"{name}.cpus: {pool.cpus} must be above 0; a small share such as 0.1 will do"
        if spec.transport == "shm" and pool.strategy == "STRICT_SPREAD" and pool.workers > 1:
            yield f"{name}.strategy: STRICT_SPREAD puts workers on different hosts, which transport: shm cannot join"


def _gpu_problems(spec: ClusterSpec) -> Iterator[str]:
    pools = spec.pools
    for name, pool in pools.items():
        if pool.gpus != 0 and not LEAST_GPUS <= pool.gpus <= 1:  # a NaN, too
            yield (
                f"{name}.gpus: {pool.gpus:g} must be 0 (the CPU), 1, or a share of one GPU of at least {LEAST_GPUS:g}, "
                "such as 0.25 for four workers on one; more GPUs take more workers"
            )
    without = [name for name, pool in pools.items() if not pool.gpus]
    if spec.uses_gpus and without:
        using = " and ".join(name for name in pools if name not in without)
        yield (
            f"{without[0]}.gpus: 0, while {using} use GPUs, whose kernels round otherwise than the CPU's: "
            "give every pool GPUs, or none"
        )
    if spec.uses_gpus and spec.model.dtype == "float32":
        yield "model.dtype: float32 is for the CPU, the GPU kernels compute in bfloat16; use auto, or set gpus to 0"


def _engine_problems(engine: EngineLimits) -> Iterator[str]:
    if engine.max_sequences < 1:
        yield f"engine.max_sequences: {engine.max_sequences} must be at least 1"
    if engine.max_batch_tokens <= engine.max_sequences:
        yield (
            f"engine.max_batch_tokens: {engine.max_batch_tokens} must exceed engine.max_sequences "
            f"({engine.max_sequences}), or running sequences leave prompts no room in a step"
        )
    for name, least in (("kv_tokens", 64), ("max_model_len", 2)):
        value = getattr(engine, name)
        if value is not None and value < least:
            yield f"engine.{name}: {value} must be at least {least}"


def _front_end_problems(front: FrontEndSpec) -> Iterator[str]:
    if front.host.strip() == "":
        yield "front_end.host: must not be empty; 127.0.0.1 listens on this machine only, 0.0.0.0 everywhere"
    for name in ("http_port", "grpc_port"):
        if not 1 <= getattr(front, name) <= 65535:
            yield f"front_end.{name}: {getattr(front, name)} must be between 1 and 65535"
    if front.http_port == front.grpc_port:
        yield f"front_end.grpc_port: {front.grpc_port} is the HTTP port too; give them different ports"
    for name in ("max_waiting", "request_timeout_s", "max_body_mb"):
        value = getattr(front, name)
        if not (value > 0 and math.isfinite(value)):
            yield f"front_end.{name}: {value} must be above 0"


def _experts(raw: Any) -> Any:
    """`experts: colocated` is short for {colocated: true}; replicas default to 2, or to 1 with a single worker."""
    if raw == "colocated":
        raw = {"colocated": True}
    if isinstance(raw, str):
        raise SpecError(f"experts: expected 'colocated' or settings such as {{workers: 2}}, got {raw!r}")
    if not isinstance(raw, Mapping):
        return raw
    pool = dict(raw)
    if pool.get("colocated") is True:
        if pool.get("workers"):
            raise SpecError(
                f"experts: colocated: true and workers: {pool['workers']} exclude each other; take one of them out"
            )
        return {**pool, "workers": 0, "replicas": 1}
    workers = pool.get("workers", ExpertPool().workers)
    if "replicas" not in pool and isinstance(workers, int):
        pool["replicas"] = max(1, min(2, workers))
    return pool


def _resolved(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths in a spec file are relative to the file, not to where the command happens to run."""
    data = dict(data)
    for section, key in (("model", "path"), ("security", "secret_file"), ("security", "api_key_file")):
        values = data.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str) and values[key] != BUNDLED:
            data[section] = {**values, key: str(folder / values[key])}
            values = data[section]
    return data


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot read the spec {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"cannot read the spec {path}: it is not UTF-8 text") from None


def with_model_path(spec: ClusterSpec, path: Path) -> ClusterSpec:
    return replace(spec, model=replace(spec.model, path=str(path)))
