"""What the controller is told once: the spec, the facts about the model, and what this start adds to them."""

from __future__ import annotations

from dataclasses import dataclass

from ..actors.settings import WorkerSettings
from .events import StartWorker
from .spec import ClusterSpec


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the control plane needs to know of a checkpoint; read from its config.json, before anything starts."""

    path: str
    num_experts: int
    moe_layers: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    architecture: str
    created: int = 0
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """`socket_dir` is for the workers' Unix sockets; `is_local` says that Ray is our own and ends with us."""

    spec: ClusterSpec
    model: ModelFacts
    secret: bytes
    api_keys: tuple[str, ...]
    socket_dir: str
    is_local: bool
    start_timeout_s: float = 600.0
    place_timeout_s: float = 60.0
    with_http: bool = True  # False when the platform deploys the Serve application itself (a RayService)

    @property
    def namespace(self) -> str:
        return namespace_of(self.spec.name)

    def __repr__(self) -> str:  # secrets stay out of logs
        return f"ControllerSettings({self.spec.name}, model={self.model.path}, is_local={self.is_local})"

    def worker(self, start: StartWorker) -> WorkerSettings:
        spec, plan = self.spec, start.worker
        return WorkerSettings(
            cluster=spec.name,
            name=plan.name,
            role=plan.role,
            incarnation=start.incarnation,
            node=start.node.name,
            model_path=self.model.path,
            dtype=spec.model.dtype,
            secret=self.secret,
            run_dir=self.socket_dir,
            tcp_host=start.node.address,
            transport=spec.transport,
            num_threads=start.threads.share,
            max_threads=start.threads.most,
            gpus=plan.gpus,
            expert_ids=plan.expert_ids,
            colocated=spec.experts.colocated and plan.role != "expert",
            max_sequences=spec.engine.max_sequences,
            max_batch_tokens=spec.engine.max_batch_tokens,
            kv_tokens=spec.engine.kv_tokens,
            max_model_len=spec.engine.max_model_len,
            kv_checksums=spec.engine.kv_checksums,
            speculation=spec.engine.speculation,
        )


def namespace_of(name: str) -> str:
    """Ray's namespace of a cluster; its Serve application has the same name."""
    return f"braid-{name}"
