"""Workers in real processes without Ray, and a front end's end of the wire, for tests of the actors room."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from braid.actors.attention_worker import AttentionWorker
from braid.actors.dialing import dial, host_id
from braid.actors.expert_worker import ExpertWorker
from braid.actors.links import Hello, Link
from braid.actors.messages import Kind, Submit, pack, unpack
from braid.actors.reactor import Closed, Reactor, Received
from braid.actors.settings import Dtype, WorkerSettings
from braid.actors.view import ClusterView, Role, Transport, WorkerInfo
from braid.cluster.plan import Node, Threads, WorkerPlan, threads_per_worker
from braid.model.config import ModelConfig
from braid.model.sampling_params import SamplingParams
from braid.router.expert_map import ExpertMap, Owner, assign, build_map

SECRET = b"the secret of a test cluster, 32 b"
LIMIT_S = 400.0  # no promise of anything: it ends what waits in vain


def _answer_calls(conn: Connection, settings: WorkerSettings) -> None:
    worker = ExpertWorker(settings) if settings.role == "expert" else AttentionWorker(settings)
    while True:
        try:
            method, args = conn.recv()
        except EOFError:
            return
        try:
            conn.send((True, getattr(worker, method)(*args)))
        except Exception as error:
            conn.send((False, error))
        if method == "stop":
            return


class WorkerProcess:
    """One worker; `call` is what Ray's control plane does in the product."""

    def __init__(self, settings: WorkerSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self.settings = settings
        self._conn, theirs = context.Pipe()
        self.process = context.Process(target=_answer_calls, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.info: WorkerInfo | None = None

    def start_call(self, method: str, *args: Any) -> None:
        self._conn.send((method, args))

    def result(self) -> Any:
        assert self._conn.poll(LIMIT_S), f"{self.settings.name} did not answer"
        succeeded, value = self._conn.recv()
        if not succeeded:
            raise value
        return value

    def call(self, method: str, *args: Any) -> Any:
        self.start_call(method, *args)
        return self.result()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is sent to it meanwhile, it finds all at once."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)  # stopped, not only told to stop
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(LIMIT_S)

    def close(self) -> None:
        if self.process.is_alive():
            self.call("stop")
        self.process.join(LIMIT_S)
        assert self.process.exitcode is not None, f"{self.settings.name} did not end"


@dataclass
class Answer:
    """What a front end has heard of one request."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprob_of: dict[int, Any] = field(default_factory=dict)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None
    error: dict[str, str] | None = None
    cached: int = 0
    accepted: int = 0
    rejected: int = 0

    @property
    def token_ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(len(self.tokens))), "a token is missing or came twice"
        return [self.tokens[index] for index in range(len(self.tokens))]

    @property
    def logprobs(self) -> list[Any]:
        return [self.logprob_of[index] for index in range(len(self.logprob_of))]


class WireFront:
    """The other end of SUBMIT and TOKENS: no tokenizer, no placement, one thread."""

    def __init__(self, name: str = "front-0") -> None:
        self.hello = Hello(name, "front", 1, host_id())
        self.reactor = Reactor()
        self.links: dict[str, Link] = {}
        self.answers: dict[str, Answer] = {}
        self.loads: dict[str, dict[str, Any]] = {}
        self.first_loads: dict[str, dict[str, Any]] = {}

    def connect(self, worker: WorkerInfo) -> None:
        self.links[worker.name] = dial(worker, self.hello, SECRET, "unix", LIMIT_S)
        self.reactor.add(self.links[worker.name])

    def submit(
        self,
        name: str,
        prompt: list[int],
        params: SamplingParams,
        decode: str,
        prefill: str,
        timeout_s: float = LIMIT_S,
    ) -> None:
        self.answers[name] = Answer()
        body = Submit(name, prompt, decode, params.to_wire(), {}, time.time() + timeout_s, self.hello.name)
        self.links[prefill].send(Kind.SUBMIT, body.pack())

    def cancel(self, name: str) -> None:
        for link in self.links.values():
            if not link.closed:
                link.send(Kind.CANCEL, pack({"id": name}))

    def wait(self, until: Callable[[], bool], what: str, timeout_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}: {self.answers}"
            for event in self.reactor.poll(0.2):
                if isinstance(event, Received):
                    self._hear(event)
                elif isinstance(event, Closed):
                    self.links.pop(event.link.peer.name, None)

    def finish(self, *names: str) -> None:
        self.wait(lambda: all(self.answers[name].finish for name in names), f"the end of {names}")

    def wait_baseline(self) -> None:
        """Every worker still linked says that all its blocks are free and nothing runs."""

        def is_idle(load: dict[str, Any]) -> bool:
            return bool(load["free_blocks"] == load["total_blocks"] and load["sequences"] == 0)

        self.wait(lambda: all(is_idle(self.loads[n]) for n in self.links if n in self.loads), "free blocks")

    def close(self) -> None:
        self.reactor.close()

    def _hear(self, event: Received) -> None:
        body = unpack(event.message.meta)
        self.first_loads.setdefault(event.link.peer.name, body["load"])
        self.loads[event.link.peer.name] = self.loads.get(event.link.peer.name, {}) | body["load"]
        for item in body.get("items", []):
            answer = self.answers[item["id"]]
            for offset, token in enumerate(item["token_ids"]):
                assert item["index"] + offset not in answer.tokens, f"{item['id']}: a token came twice"
                answer.tokens[item["index"] + offset] = token
            for offset, logprob in enumerate(item.get("logprobs", [])):
                answer.logprob_of[item["index"] + offset] = logprob
            answer.prompt_logprobs += item.get("prompt_logprobs", [])
            answer.finish = item.get("finish") or answer.finish
            answer.error = item.get("error") or answer.error
            answer.cached = max(answer.cached, item.get("cached", 0))
            answer.accepted, answer.rejected = item.get("accepted", 0), item.get("rejected", 0)


class ProcessCluster:
    """A whole data plane: workers, map and one WireFront. `cores`, if told, are shared out as `braid up` does it."""

    def __init__(
        self,
        model_path: Path,
        run_dir: Path,
        prefill: int = 1,
        decode: int = 1,
        experts: int | Literal["colocated"] = 2,
        dtype: Dtype = "float32",
        transport: Transport = "auto",
        replicas: int = 2,
        claimed_replicas: int | None = None,
        threads: int = 1,
        cores: int | None = None,
        **limits: Any,
    ) -> None:
        self.config = ModelConfig.from_path(model_path)
        colocated = experts == "colocated"
        names: list[tuple[str, Role]] = [(f"prefill-{i}", "prefill") for i in range(prefill)]
        names += [(f"decode-{i}", "decode" if prefill else "both") for i in range(decode)]
        expert_names = [] if experts == "colocated" else [f"expert-{i}" for i in range(experts)]
        held = assign(self.config.n_routed_experts or 0, expert_names, replicas) if expert_names else {}
        self.workers: dict[str, WorkerProcess] = {}
        plans = [WorkerPlan(name, role, "decode", 0) for name, role in names]
        plans += [WorkerPlan(name, "expert", "expert", 0, held[name]) for name in expert_names]
        for plan in plans:
            node = Node("node", "127.0.0.1", cores or 0)
            has = threads_per_worker(node, plan, plans) if cores else Threads(threads, threads)
            settings = WorkerSettings(
                "test", plan.name, plan.role, 1, node.name, str(model_path), dtype, SECRET, str(run_dir), node.address,
                transport, has.share, max_threads=has.most, expert_ids=plan.expert_ids, colocated=colocated, **limits,
            )  # fmt: skip
            self.workers[plan.name] = WorkerProcess(settings)
        for worker in self.workers.values():
            worker.start_call("prepare")
        for worker in self.workers.values():
            worker.info = worker.result()
        expert_map: ExpertMap | None = None
        if expert_names:
            every = range(self.config.num_hidden_layers + self.config.num_nextn_predict_layers)
            layers = [layer for layer in every if self.config.is_moe_layer(layer)]
            owners = [Owner(name, 1) for name in expert_names]
            if claimed_replicas:  # a map that names holders which do not hold
                held = assign(self.config.n_routed_experts or 0, expert_names, claimed_replicas)
            expert_map = build_map(1, self.config.n_routed_experts or 0, layers, owners, held)
            expert_map.check()
        infos = tuple(worker.info for worker in self.workers.values() if worker.info)
        self.view = ClusterView(1, infos, expert_map, transport)
        self.front = WireFront()
        for info in infos:  # before the view is applied: front ends can be as fast
            if info.role != "expert":
                self.front.connect(info)
        for worker in self.workers.values():
            worker.call("apply", self.view)
        self.front.wait(lambda: len(self.front.loads) == len(self.front.links), "the first load reports")

    def submit(self, name: str, prompt: list[int], params: SamplingParams, **where: Any) -> None:
        prefill = where.pop("prefill", self._first)
        self.front.submit(name, prompt, params, where.pop("decode", "decode-0"), prefill, **where)

    @property
    def _first(self) -> str:
        """Where prompts go if nothing else is said."""
        return "prefill-0" if "prefill-0" in self.workers else "decode-0"

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
        """All at once; returns the answers in order."""
        names = [f"r{len(self.front.answers) + i}" for i in range(len(prompts))]
        with self.workers[self._first].stopped():
            for name, prompt in zip(names, prompts, strict=True):
                self.submit(name, prompt, params)
        self.front.finish(*names)
        return [self.front.answers[name] for name in names]

    def close(self) -> None:
        self.front.close()
        for worker in self.workers.values():
            worker.close()
