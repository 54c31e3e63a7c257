"""An expert worker: a stateless process that answers whatever rows have arrived, from any attention worker."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..model.checkpoint import Checkpoint
from ..model.config import ModelConfig
from ..model.families import ops_for
from ..model.self_test import self_test
from ..model.weights import load_experts
from .devices import device_for
from .endpoint import Endpoint
from .expert_host import ExpertHost
from .expert_server import ExpertServer
from .loading import Loading, memory_checked, resolve_dtype
from .paired_server import PairedServer
from .settings import WorkerSettings
from .staging import StagedHost
from .view import ClusterView, WorkerInfo

if TYPE_CHECKING:
    from .device_server import DeviceServer


class ExpertWorker:
    """Plain class; `prepare` loads and serves, the other methods answer the controller from other threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.loading = Loading()
        self.endpoint: Endpoint | None = None

    def prepare(self) -> WorkerInfo:
        """Loads only this worker's routed experts, then serves.

        Raises CheckpointError, ValueError (memory) and SelfTestError.
        """
        config = ModelConfig.from_path(self.settings.model_path)
        assert config.n_routed_experts, f"{self.settings.model_path} has no routed experts: no expert worker is needed"
        experts = self.settings.expert_ids or tuple(range(config.n_routed_experts))
        self._device = device = device_for(self.settings.gpus)
        dtype = resolve_dtype(self.settings.dtype, config, device.is_gpu)
        self._ops = ops = ops_for(dtype, device.torch, config.quantization)
        ops.set_threads(self.settings.num_threads, self.settings.max_threads)
        checkpoint = Checkpoint(self.settings.model_path)
        has_mtp = self.settings.speculation and checkpoint.has_mtp(config)
        memory_checked(config, dtype, "expert", experts, has_mtp, device.available_memory(), device.is_gpu)
        with torch.inference_mode():
            layers = range(config.num_hidden_layers + has_mtp)
            weights = load_experts(checkpoint, config, layers, experts, dtype, self.loading.progress, ops=ops)
        self.loading.phase = "self-test"
        self_test(config, dtype, ops, "experts")
        endpoint, shape = Endpoint(self.settings), (config.hidden_size, config.n_routed_experts, dtype)
        if device.is_alone:
            here = device.torch, self.settings.tcp_host
            self.server: ExpertServer = PairedServer(weights, *shape, *here, endpoint.reactor.wake)
        else:
            self.server = ExpertServer((StagedHost if device.is_gpu else ExpertHost)(weights, shape[1]), *shape)
        self._mail: DeviceServer | None = None
        if device.is_gpu:
            from .device_server import DeviceServer  # imports triton, which only torch for CUDA brings along

            sizes = config.n_routed_experts, config.hidden_size, config.num_experts_per_tok
            self._mail = DeviceServer(self.server, weights, *sizes, device.torch)
        self.endpoint = endpoint
        self.endpoint.start(self._serve)
        self.loading.phase = "ready"
        return replace(self.endpoint.info, kernels=ops.family)

    def progress(self) -> dict[str, Any]:
        return self.loading.report()

    def apply(self, view: ClusterView) -> None:
        """Expert workers dial nobody; they drop the links of lives that left the cluster."""
        assert self.endpoint is not None, "apply before prepare"
        self.endpoint.apply(view, [])

    def status(self) -> dict[str, Any]:
        base = {"name": self.settings.name, "role": "expert", "pid": os.getpid()}
        if self.endpoint is None:
            return base
        self.endpoint.check()
        return base | self._device.report() | {"links": self.endpoint.describe_links(), **self.server.counts}

    def stop(self) -> None:
        if self.endpoint:
            self.endpoint.stop()

    def _serve(self) -> None:
        assert self.endpoint is not None
        endpoint = self.endpoint
        self._ops.set_threads(self.settings.num_threads, self.settings.max_threads)
        with torch.inference_mode():
            if self._mail is None:
                self.server.serve(endpoint, lambda: endpoint.stopping)
            else:
                self._mail.serve(endpoint, lambda: endpoint.stopping)
