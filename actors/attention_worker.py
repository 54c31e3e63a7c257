"""An attention worker: holds the KV cache and everything of the network but the routed experts.

Roles: `prefill` computes prompts and hands them over, `decode` goes on from there, `both` does both.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..model.checkpoint import Checkpoint
from ..model.config import ModelConfig
from ..model.deepseek import DeepSeekModel
from ..model.families import ops_for
from ..model.kv_cache import BLOCK_SIZE, BlockAllocator, LatentCache, blocks_for
from ..model.mtp import MtpModule
from ..model.ops import Ops
from ..model.self_test import self_test
from ..model.weights import load_attention, load_experts
from .colocated_experts import ColocatedExperts
from .devices import device_for
from .dispatch import RemoteExperts
from .drafter import Drafter
from .endpoint import Endpoint
from .engine import Engine
from .links import LinkError
from .loading import Loading, memory_checked, resolve_dtype
from .messages import Kind, pack
from .paired_experts import PairedExperts
from .reactor import Event, Opened
from .requests import Requests
from .scheduler import Scheduler
from .settings import WorkerSettings
from .staging import StagedExperts
from .tracing import Tracer, setup_tracer
from .view import ClusterView, Role, WorkerInfo
from .worker_load import cache_counters, draft_counters, hop_counters, room_of

if TYPE_CHECKING:
    from .device_experts import DeviceExperts

log = logging.getLogger(__name__)

KV_SHARE = 0.2  # of the memory that is free after loading, when the spec names no kv_tokens
GPU_KV_SHARE = 0.8  # of a GPU's, which has little else to hold than a step's rows
MAX_WAITING = 1024
MAX_FAILED_STEPS = 3
LOAD_INTERVAL_S = 1.0


class AttentionWorker:
    """Plain class; `prepare` loads and serves, the other methods answer the controller from other threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.loading = Loading()
        self.endpoint: Endpoint | None = None
        self._view: ClusterView | None = None
        self._is_open = False  # front ends place nothing on a worker that has not told its load
        self._applying = threading.Lock()
        self._latest_load: dict[str, Any] = {}
        self._tracer: Tracer | None = None

    def prepare(self) -> WorkerInfo:
        """Loads what the role needs, proves the kernels on this machine, then serves.

        Raises CheckpointError, ValueError (memory, settings) and SelfTestError.
        """
        self.config = config = ModelConfig.from_path(self.settings.model_path)
        self._device = device = device_for(self.settings.gpus)
        dtype = resolve_dtype(self.settings.dtype, config, device.is_gpu)
        self._ops = ops = ops_for(dtype, device.torch, config.quantization)
        ops.set_threads(self.settings.num_threads, self.settings.max_threads)
        with torch.inference_mode():
            self._load(config, dtype, ops)
            self.loading.phase = "self-test"
            self_test(config, dtype, ops)
        self.endpoint = Endpoint(self.settings)
        self._tracer = setup_tracer(f"braid-{self.settings.role}", f"{self.settings.cluster}/{self.settings.name}")
        self.experts: RemoteExperts | StagedExperts | DeviceExperts | ColocatedExperts
        self._remote: RemoteExperts | None = None
        self._paired: PairedExperts | None = None  # on a GPU: the same, with rows that stay on devices
        self._mail: DeviceExperts | None = None  # on a GPU: the way to expert workers of this host
        if self._local is not None:
            self.experts = ColocatedExperts(self._local)
        else:
            num_experts, endpoint = config.n_routed_experts or 0, self.endpoint
            if device.is_alone:
                address = self.settings.tcp_host, endpoint.hello.host_id
                self._paired = PairedExperts(endpoint, num_experts, device.torch, *address)
            self._remote = self._paired or RemoteExperts(endpoint, num_experts)
            self.experts = self._on_gpu(self._remote, ops) if device.is_gpu else self._remote
        num_layers = config.num_hidden_layers + len(self._weights.mtp[:1])
        num_blocks = self._num_blocks(config, dtype, num_layers)
        cache = LatentCache(config, num_blocks, dtype, num_layers, device.torch)
        scheduler = Scheduler(
            BlockAllocator(num_blocks), self.settings.max_sequences, self.settings.max_batch_tokens, MAX_WAITING
        )
        self.requests = Requests(
            self.settings.name, config, cache, scheduler, self._tracer, self.load, self.settings.kv_checksums
        )
        model = DeepSeekModel(config, self._weights, cache, self.experts)
        self.drafter: Drafter | None = None
        if self._weights.mtp:
            module = MtpModule(config, self._weights.mtp[0], cache, self.experts, model.rope)
            self.drafter = Drafter(config, module, self.experts)
        self.engine = Engine(config, model, self.experts, self.requests, self.drafter)
        if self._remote is not None:
            self._remote.while_waiting = self.engine.meanwhile
        self.endpoint.start(self._serve)
        self.loading.phase = "ready"
        return replace(self.endpoint.info, kernels=ops.family)

    def progress(self) -> dict[str, Any]:
        return self.loading.report()

    def apply(self, view: ClusterView) -> None:
        """Dials what the role talks to, then lets the engine swap to the view between two steps.

        Start-up is all or nothing: of the first view every peer must answer, else LinkError. Later on a peer that does
        not is about to leave the view, and that must not cost the cluster the worker that noticed.
        """
        assert self.endpoint is not None, "apply before prepare"
        with self._applying:  # the controller's calls come in threads, and a newer one may be faster
            if self._view is not None and view.epoch <= self._view.epoch:
                return
            try:
                self.endpoint.apply(view, dial_targets(self.settings.name, self.settings.role, view))
            except LinkError:
                if self._view is None:
                    raise
                log.warning("%s goes on without a peer of view %d", self.settings.name, view.epoch, exc_info=True)
            self._view = view
        self.endpoint.reactor.wake()

    def status(self) -> dict[str, Any]:
        base = {"name": self.settings.name, "role": self.settings.role, "pid": os.getpid()}
        if self.endpoint is None:
            return base
        self.endpoint.check()
        return base | self._latest_load | {"links": self.endpoint.describe_links()}

    def stop(self) -> None:
        if self.endpoint:
            self.endpoint.stop()
        if self._tracer:
            self._tracer.close()

    def load(self, with_counters: bool) -> dict[str, Any]:
        """What front ends place requests by; with counters also what /metrics shows.

        Serving thread only: it reads live queues.
        """
        load = room_of(self.settings, self.requests.scheduler)
        if with_counters:
            load |= self._device.report()
            load["counters"] = self._counters()
        self._latest_load = self._latest_load | load
        return load

    def _counters(self) -> dict[str, float]:
        return {
            **self.requests.counters,
            "forward_s": round(self.engine.forward_s, 6),
            "host_s": round(self.engine.host_s, 6),
            **cache_counters(self.requests.scheduler),
            **draft_counters(self.drafter),
            **hop_counters(self._remote, self._mail),
        }

    def _on_gpu(self, remote: RemoteExperts, ops: Ops) -> StagedExperts | DeviceExperts:
        """The host waits for rows where others use the GPU too: a kernel that waited would keep them from computing."""
        staged = StagedExperts(remote, ops)
        if not self._device.is_alone:
            return staged
        from .device_experts import DeviceExperts, box_shape  # imports triton, which only torch for CUDA brings along

        assert self.endpoint is not None
        shape = box_shape(self.config, self.settings.max_batch_tokens)
        self._mail = DeviceExperts(staged, shape, self.endpoint.hello.host_id, ops.device, ops.tensor)
        self.endpoint.on_death = self._mail.bury
        return self._mail

    def _load(self, config: ModelConfig, dtype: torch.dtype, ops: Ops) -> None:
        every = tuple(range(config.n_routed_experts or 0))
        checkpoint = Checkpoint(self.settings.model_path)
        has_mtp = self.settings.speculation and checkpoint.has_mtp(config)
        held = every if self.settings.colocated else ()
        available = self._device.available_memory()
        memory_checked(config, dtype, "attention", held, has_mtp, available, self._device.is_gpu)
        self._weights = load_attention(checkpoint, config, dtype, self.loading.progress, has_mtp, ops)
        self._local = None
        if self.settings.colocated or not every:
            layers = range(config.num_hidden_layers + has_mtp)
            self._local = load_experts(checkpoint, config, layers, every, dtype, self.loading.progress, ops=ops)

    def _num_blocks(self, config: ModelConfig, dtype: torch.dtype, num_layers: int) -> int:
        longest = min(self.settings.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        wanted = self.settings.kv_tokens
        if wanted is None:
            token_bytes = config.latent_dim * num_layers * dtype.itemsize
            share = GPU_KV_SHARE if self._device.is_gpu else KV_SHARE
            room = int(self._device.available_memory() * share) // token_bytes
            wanted = min(room, self.settings.max_sequences * longest)
        if wanted < BLOCK_SIZE:
            raise ValueError(f"{wanted} tokens of KV cache are less than one block of {BLOCK_SIZE}: raise kv_tokens")
        return blocks_for(wanted)

    def _serve(self) -> None:
        assert self.endpoint is not None
        endpoint, engine, requests = self.endpoint, self.engine, self.requests
        self._ops.set_threads(self.settings.num_threads, self.settings.max_threads)
        view, failed_steps, load_due, busy = self._view, 0, 0.0, False
        with torch.inference_mode():
            while not endpoint.stopping:
                events = endpoint.inbox(0.0 if busy or requests.is_sending else LOAD_INTERVAL_S)
                if view is not self._view:  # its links have been made: we open them before anybody hears so
                    view = self._view
                    events += endpoint.inbox(0.0)
                for event in events:
                    requests.handle(event)
                    if self._mail is not None:
                        self._mail.hear(event)
                    if self._paired is not None:
                        self._paired.hear(event)
                was_open = self._is_open
                self._swap_view(view, has_news=any(_is_link_of("expert", event) for event in events))
                if self._is_open != was_open or any(_is_link_of("front", event) for event in events):
                    load_due = 0.0
                try:
                    busy = engine.step()
                    failed_steps = 0 if busy else failed_steps  # a round without work proves nothing
                except Exception as error:  # one bad step must not end the worker; three in a row do
                    log.exception("a step of %s failed", self.settings.name)
                    requests.fail_step(f"a step of {self.settings.name} failed: {error}")
                    failed_steps += 1
                    if failed_steps == MAX_FAILED_STEPS:
                        raise
                if time.monotonic() >= load_due or (not busy and events):
                    self._broadcast_load()
                    load_due = time.monotonic() + LOAD_INTERVAL_S
            requests.fail_all("unavailable", f"{self.settings.name} is stopping")
            if self._paired is not None:
                self._paired.close()

    def _swap_view(self, view: ClusterView | None, has_news: bool) -> None:
        """`has_news`: an expert worker is linked (again): under the same map, rows may go to it from now on."""
        if view is None:
            return
        self._is_open = True
        if view.expert_map is None or self._remote is None:
            return
        if has_news or view.expert_map.epoch != self._remote.epoch:
            assert self.endpoint is not None
            names = [owner.worker for owner in view.expert_map.owners]
            links = {name: link for name in names if (link := self.endpoint.link_to(name)) is not None}
            self._remote.set_map(view.expert_map, links)
            if self._mail is not None:
                self._mail.set_map(view.expert_map, links)

    def _broadcast_load(self) -> None:
        """Front ends hear nothing before the links of the first view stand: they would send requests."""
        assert self.endpoint is not None
        load = pack({"load": self.load(True)})
        if self._is_open:
            self.endpoint.broadcast("front", Kind.LOAD, load)


def dial_targets(name: str, role: Role, view: ClusterView) -> list[WorkerInfo]:
    """Expert workers, and for whoever computes prompts the decode workers; of two in role `both` the first by name."""
    targets = view.of_role("expert") if view.expert_map else []
    if role != "decode":
        targets += view.of_role("decode")
        targets += [worker for worker in view.of_role("both") if role == "prefill" or worker.name > name]
    return targets


def _is_link_of(role: str, event: Event) -> bool:
    return isinstance(event, Opened) and event.link.peer.role == role
