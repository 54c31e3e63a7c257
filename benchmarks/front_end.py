"""What the front ends add to the engine: time to the first token at concurrency 1, and CPU time per token; and what an
idle cluster uses.

    python benchmarks/front_end.py [--model DIR] [--repeats 60] [--out FILE.json]

One cluster, one prompt length, the ways in taking turns: straight over a link to the worker, through the front end core
alone (in this process), over gRPC and over HTTP. The first token's way is the same worker's in every case, so the
difference is what stands in front of it. Start it outside the repository.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import psutil
from rich.console import Console
from rich.table import Table

from braid.actors.dialing import dial, host_id
from braid.actors.links import Hello
from braid.actors.messages import Kind, Submit, unpack
from braid.actors.reactor import Reactor, Received
from braid.actors.view import ClusterView, WorkerInfo
from braid.cluster import braid_v1_pb2 as pb
from braid.cluster import braid_v1_pb2_grpc
from braid.cluster.front_end import FrontEnd
from braid.cluster.registry import Registry
from braid.cluster.request import FrontEndSettings, GenerateRequest
from braid.model.config import ModelConfig
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

BRAID = Path(sys.executable).parent / "braid"
BUNDLED = Path(str(__import__("braid").__path__[0])) / "model" / "bundled"
NAME, WORKER = "front-end-bench", "decode-0"
HTTP_PORT, GRPC_PORT = 18940, 18941
FRONTS = ("ray::FrontActor", "ray::ServeReplica", "ray::ProxyActor")
NEW_TOKENS = 64
SETTLE_S, IDLE_S = 5.0, 20.0

Ask = Callable[[str, int], Awaitable[tuple[float, int]]]  # (prompt, max_tokens) -> seconds to the first token, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--words", type=int, default=20, help="length of a prompt")
    parser.add_argument("--streams", type=int, default=32, help="concurrency of the CPU measurement")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as work:
        secret = secrets.token_hex(32)
        Path(work, "secret").write_text(secret)
        Path(work, "secret").chmod(0o600)
        spec = Path(work, "spec.yaml")
        spec.write_text(json.dumps(_spec(args.model)))
        _braid("up", str(spec), "--detach", cwd=work)
        try:
            result = asyncio.run(measure(args, secret.encode()))
        finally:
            _braid("down", "--name", NAME, cwd=work)
    show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _spec(model: Path) -> dict[str, Any]:
    return {
        "name": NAME,
        "model": {"path": "bundled" if model == BUNDLED else str(model.resolve())},
        "prefill": {"workers": 0},
        "experts": "colocated",
        "front_end": {"http_port": HTTP_PORT, "grpc_port": GRPC_PORT},
        "security": {"secret_file": "secret"},
    }


def _braid(*arguments: str, cwd: str) -> None:
    done = subprocess.run([str(BRAID), *arguments], cwd=cwd, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"braid {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


async def measure(args: argparse.Namespace, secret: bytes) -> dict[str, Any]:
    worker = _worker()
    tokenizer = Tokenizer(args.model)
    core = await _core(worker, secret, args.model, tokenizer)
    channel = grpc.insecure_channel(f"127.0.0.1:{GRPC_PORT}")
    many = grpc.aio.insecure_channel(f"127.0.0.1:{GRPC_PORT}")
    ways: dict[str, Ask] = {
        "engine": Engine(worker, secret, tokenizer).ask,
        "core": lambda prompt, num: _ask_core(core, tokenizer, prompt, num),
        "grpc": lambda prompt, num: _ask_grpc_first(channel, prompt),
        "http": lambda prompt, num: _ask_http(HTTP_PORT, prompt, num),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 5):
        for name, ask in ways.items():
            taken, _ = await ask(_prompt(args.words), 1)
            if turn >= 5:  # the first ones warm up
                times[name].append(1e3 * taken)
    ways["grpc"] = lambda prompt, num: _ask_grpc(many, prompt, num)
    cpu = {name: await _cpu_per_token(ways[name], args) for name in ("grpc", "http")}
    channel.close()
    await many.close()
    await core.close()
    await asyncio.sleep(SETTLE_S)
    idle = await _idle_percent()
    return {
        "idle_percent_of_a_core": idle,
        "ttft_ms": times,
        "tokenize_ms": _tokenize_ms(tokenizer, args.words),
        "cpu_us_per_token": cpu,
    }


def _worker() -> WorkerInfo:
    """The running cluster's only worker."""
    run_dir = Registry().get(NAME).run_dir
    return WorkerInfo(WORKER, "both", 1, host_id(), f"{run_dir}/s/{WORKER}.1", "127.0.0.1", 0, 0, "")


class Engine:
    """A bare front end: a link and nothing else."""

    def __init__(self, worker: WorkerInfo, secret: bytes, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.hello = Hello(f"bench-{secrets.token_hex(3)}", "front", 1, host_id())
        self.reactor = Reactor()
        self.link = dial(worker, self.hello, secret, "unix", 5.0)
        self.reactor.add(self.link)
        self.number = 0

    async def ask(self, prompt: str, max_tokens: int) -> tuple[float, int]:
        self.number += 1
        name, ids = f"{self.hello.name}-{self.number}", self.tokenizer.encode(prompt)
        began = time.perf_counter()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0).to_wire()
        body = Submit(name, ids, WORKER, params, {}, time.time() + 60, self.hello.name)
        self.link.send(Kind.SUBMIT, body.pack())
        while True:
            for event in self.reactor.poll(5.0):
                if isinstance(event, Received):
                    items = unpack(event.message.meta).get("items", ())
                    if any(item["id"] == name and item["token_ids"] for item in items):
                        return time.perf_counter() - began, 1


async def _core(worker: WorkerInfo, secret: bytes, model: Path, tokenizer: Tokenizer) -> FrontEnd:
    config = ModelConfig.from_path(model)
    name = f"bench-{secrets.token_hex(3)}"
    core = FrontEnd(FrontEndSettings(name, secret, "m", config.vocab_size, config.max_position_embeddings), tokenizer)
    await core.apply(ClusterView(1, (worker,), None))
    while not core.ready:
        await asyncio.sleep(0.01)
    return core


async def _ask_core(core: FrontEnd, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> tuple[float, int]:
    began = time.perf_counter()
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    request = GenerateRequest(tuple(tokenizer.encode(prompt)), params)
    first, count = 0.0, 0
    async with aclosing(core.generate(request)) as deltas:
        async for delta in deltas:
            first = first or time.perf_counter() - began
            count += len(delta.token_ids)
    return first, count


async def _ask_grpc_first(channel: grpc.Channel, prompt: str) -> tuple[float, int]:
    """One token. gRPC's client for asyncio takes a millisecond itself, this one does not."""
    began = time.perf_counter()
    sampling = pb.Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    responses = braid_v1_pb2_grpc.BraidStub(channel).Generate(pb.GenerateRequest(text=prompt, sampling=sampling))
    next(iter(responses))
    return time.perf_counter() - began, 1


async def _ask_grpc(channel: Any, prompt: str, max_tokens: int) -> tuple[float, int]:
    began = time.perf_counter()
    sampling = pb.Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    first, count = 0.0, 0
    request = pb.GenerateRequest(text=prompt, sampling=sampling)
    async for response in braid_v1_pb2_grpc.BraidStub(channel).Generate(request):
        first = first or time.perf_counter() - began
        count += len(response.token_ids)
    return first, count


async def _ask_http(port: int, prompt: str, max_tokens: int) -> tuple[float, int]:
    """A streamed completion; the connection is made beforehand, as a client with a pool has it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps({**fields, "return_token_ids": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    began = time.perf_counter()
    writer.write(head.encode() + b"\r\n\r\n" + body)
    first, count = 0.0, 0
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        if not line:
            raise SystemExit("the HTTP stream ended early")
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - began
            count += len(json.loads(line[6:])["choices"][0]["token_ids"])
    writer.close()
    return first, count


async def _cpu_per_token(ask: Ask, args: argparse.Namespace) -> float:
    """Microseconds of CPU in all front end processes and Serve's proxy, per generated token; the least of 3 rounds."""
    fronts = [p for p in map(_process, Registry().get(NAME).processes()) if p and p.name().startswith(FRONTS)]
    found = []
    for _ in range(3):
        before = sum(_cpu_s(front) for front in fronts)
        answers = await asyncio.gather(*[ask(_prompt(args.words), NEW_TOKENS) for _ in range(args.streams)])
        found.append(1e6 * (sum(_cpu_s(front) for front in fronts) - before) / sum(count for _, count in answers))
    return min(found)


async def _idle_percent() -> dict[str, float]:
    """CPU time of each process of the cluster, Ray's own included, over IDLE_S."""
    processes = [process for process in map(_process, Registry().get(NAME).processes()) if process]
    before = {process: _cpu_s(process) for process in processes}
    await asyncio.sleep(IDLE_S)
    used = {f"{p.name()} {p.pid}": 100 * (_cpu_s(p) - before[p]) / IDLE_S for p in processes}
    return {name: round(percent, 2) for name, percent in sorted(used.items(), key=lambda item: -item[1])}


def _process(known: Any) -> psutil.Process | None:
    return psutil.Process(known.pid) if psutil.pid_exists(known.pid) else None


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _prompt(num_words: int) -> str:
    """New every time: no cached prefix shortens anybody's way."""
    return " ".join(random.choice(("def", "class", "return", "import", "self", "value")) for _ in range(num_words))


def _tokenize_ms(tokenizer: Tokenizer, num_words: int) -> float:
    taken = []
    for _ in range(200):
        prompt = _prompt(num_words)
        began = time.perf_counter()
        tokenizer.encode(prompt)
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def show(result: dict[str, Any]) -> None:
    table = Table(title="time to the first token at concurrency 1, ms")
    for column in ("way", "median", "least", "added to the engine (medians)", "CPU us per token"):
        table.add_column(column, justify="right")
    engine = statistics.median(result["ttft_ms"]["engine"])
    for name, times in result["ttft_ms"].items():
        median, cpu = statistics.median(times), result["cpu_us_per_token"].get(name)
        added = f"{median - engine:.2f}" if name != "engine" else ""
        table.add_row(name, f"{median:.2f}", f"{min(times):.2f}", added, f"{cpu:.0f}" if cpu else "")
    Console(width=100).print(table)
    Console().print(f"of which tokenizing: {result['tokenize_ms']:.3f} ms")
    Console().print("idle, % of a core:", result["idle_percent_of_a_core"])


if __name__ == "__main__":
    main()
