"""What a worker is told once, when its process starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .view import Role, Transport

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One worker's share of the ClusterSpec. The secret proves membership in every link's handshake (law 10)."""

    cluster: str
    name: str
    role: Role
    incarnation: int
    node: str
    model_path: str
    dtype: Dtype
    secret: bytes
    run_dir: str
    tcp_host: str
    transport: Transport
    num_threads: int  # its share of the node's cores
    gpus: float = 0.0  # what Ray has reserved for it; above 0 it computes on the GPU that its process sees
    expert_ids: tuple[int, ...] | None = None
    colocated: bool = False
    max_sequences: int = 64
    max_batch_tokens: int = 2048
    kv_tokens: int | None = None
    max_model_len: int | None = None
    kv_checksums: bool = False
    max_threads: int | None = None  # beyond its share, for kernels whose idle threads leave the cores to others
    speculation: bool = True

    def __repr__(self) -> str:
        return f"WorkerSettings({self.cluster}/{self.name}#{self.incarnation} {self.role}, model={self.model_path})"
