"""What `braid up` checks before it starts anything: model, memory, ports, secrets. Every failure is one clear line."""

from __future__ import annotations

import errno
import secrets
import socket
from pathlib import Path

import psutil

from ..model.config import ModelConfig
from ..model.licences import find_licences
from ..model.tokenizer import Tokenizer
from .callers import api_keys_in
from .controller_settings import ModelFacts
from .errors import SpecError
from .local_gpus import LocalGpus
from .plan import gpus_needed, plan_pools
from .spec import BUNDLED, ClusterSpec

NO_GPUS = LocalGpus()


def model_path(spec: ClusterSpec) -> Path:
    if spec.model.path == BUNDLED:
        return Path(__file__).resolve().parent.parent / "model" / "bundled"
    return Path(spec.model.path).expanduser().resolve()


def model_facts(spec: ClusterSpec) -> ModelFacts:
    """Reads everything but the weights. Raises ValueError for a model that cannot be served as the spec says."""
    path = model_path(spec)
    if not path.is_dir():
        raise SpecError(f"model.path: {path} is not a directory with a checkpoint")
    config = ModelConfig.from_path(path)
    longest = spec.engine.max_model_len or config.max_position_embeddings
    if longest > config.max_position_embeddings:
        raise SpecError(
            f"engine.max_model_len: {longest} is longer than the model's context of "
            f"{config.max_position_embeddings} tokens (max_position_embeddings); lower it or leave it out"
        )
    tokenizer = Tokenizer(path)  # a broken one, or a chat template that does not compile, is said before the start
    no_text = () if tokenizer.has_text else (f"{path} has no tokenizer.json: this cluster takes token ids, not text.",)
    facts = ModelFacts(
        path=str(path),
        num_experts=config.n_routed_experts or 0,
        moe_layers=_moe_layers(config, spec),
        vocab_size=config.vocab_size,
        max_model_len=longest,
        architecture=(config.architectures or (config.model_type,))[0],
        created=int((path / "config.json").stat().st_mtime),
        notices=find_licences(path).notices + no_text,
    )
    plan_pools(spec, facts.num_experts)
    return facts


def check_weights(spec: ClusterSpec, facts: ModelFacts, gpus: LocalGpus = NO_GPUS) -> None:
    """Every tensor's name, shape and type, and the memory that all local workers will want. Imports torch."""
    from ..actors.loading import available_memory, resolve_dtype
    from ..model.checkpoint import Checkpoint
    from ..model.inventory import bytes_for_role, check_memory

    config, checkpoint = ModelConfig.from_path(facts.path), Checkpoint(facts.path)
    checkpoint.check(config)
    on_gpu = spec.uses_gpus
    has_mtp = spec.engine.speculation and checkpoint.has_mtp(config)
    dtype = resolve_dtype(spec.model.dtype, config, on_gpu)
    every = range(facts.num_experts)
    num_attention = spec.prefill.workers + spec.decode.workers
    colocated = every if spec.experts.colocated else ()
    needed = num_attention * bytes_for_role(config, dtype, "attention", colocated, has_mtp, on_gpu)
    for pool in plan_pools(spec, facts.num_experts):
        for plan in pool.workers:
            if plan.expert_ids is not None:
                needed += bytes_for_role(config, dtype, "expert", plan.expert_ids, has_mtp, on_gpu)
    available = sum(gpus.memory) if on_gpu else available_memory()
    check_memory(needed, available)
    if spec.engine.kv_tokens is not None:
        cache = spec.engine.kv_tokens * config.latent_dim * (config.num_hidden_layers + has_mtp) * dtype.itemsize
        if needed + num_attention * cache > available:
            raise SpecError(
                f"engine.kv_tokens: {spec.engine.kv_tokens} tokens take {cache / 2**30:.1f} GiB on each of "
                f"{num_attention} attention workers; {(available - needed) / 2**30:.1f} GiB are left beside the weights"
            )


def check_gpus(spec: ClusterSpec, facts: ModelFacts, gpus: LocalGpus) -> None:
    """That the workers of a Ray of our own fit on this machine's GPUs."""
    needed = gpus_needed(plan_pools(spec, facts.num_experts))
    if needed and gpus.problem:
        raise SpecError(f"gpus: the pools ask for GPUs, and {gpus.problem}")
    if needed > gpus.count:
        raise SpecError(
            f"gpus: the pools take {needed} GPUs and this machine has {gpus.count}; lower the shares, so that several "
            "workers use one, or the number of workers"
        )


def _moe_layers(config: ModelConfig, spec: ClusterSpec) -> tuple[int, ...]:
    """What the expert map covers. Where the weights lack the MTP module that config.json names, nobody asks for it."""
    has_mtp = spec.engine.speculation and config.num_nextn_predict_layers > 0
    return tuple(layer for layer in range(config.num_hidden_layers + has_mtp) if config.is_moe_layer(layer))


def check_ports(spec: ClusterSpec) -> None:
    front = spec.front_end
    for name in ("http_port", "grpc_port"):
        _check_port(name, front.host, getattr(front, name))


def read_secret(spec: ClusterSpec) -> bytes:
    """The cluster's secret for link handshakes: from the file, or drawn anew."""
    if spec.security.secret_file is None:
        return secrets.token_bytes(32)
    secret = _read("security.secret_file", spec.security.secret_file).strip()
    if len(secret) < 16:
        raise SpecError(
            f"security.secret_file: {spec.security.secret_file} holds {len(secret)} bytes, at least 16 needed"
        )
    return secret


def read_api_keys(spec: ClusterSpec) -> tuple[str, ...]:
    if spec.security.api_key_file is None:
        return ()
    keys = api_keys_in(_read("security.api_key_file", spec.security.api_key_file).decode("utf-8", "replace"))
    if not keys:
        raise SpecError(
            f"security.api_key_file: {spec.security.api_key_file} holds no key, so nobody could ask anything"
        )
    return keys


def _check_port(name: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            trial.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise SpecError(
                    f"front_end.{name}: port {port} on {host} is in use{_user_of(port)}; choose another port"
                ) from None
            raise SpecError(f"front_end.{name}: cannot listen on {host}:{port}: {error.strerror}") from None


def _user_of(port: int) -> str:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SpecError(f"{name}: cannot read {path}: {error.strerror}") from None
