"""`braid demo`: a whole cluster on this machine, one prompt over gRPC, one over OpenAI HTTP, and what ran where."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator

import openai
from rich.console import Console
from rich.table import Table

from . import braid_v1_pb2 as pb
from .local_gpus import local_gpus
from .ports import free_ports
from .processes import wait_gone
from .registry import Registry
from .spec import ClusterSpec, from_dict
from .status import status
from .talk import Line, generate
from .terminal import Row, StartProgress, console_for
from .up import Started, check, keep, signals_stop_it, start, wait_until_ready

NAME = "braid-demo"
# A prompt that ends in a line break or a blank cuts a token in two, which small models mind.
GRPC_PROMPT = 'def is_prime(n):\n    """Return True if'
HTTP_PROMPT = "def read_lines(path):\n    with open(path"
MAX_TOKENS = 80
TIMEOUT_S = 600.0  # the first start on a GPU compiles its kernels, and a busy machine takes long to import them
LEAVE_S = 60.0
TEMPERATURE = 0.5
SEED = 1


def demo() -> int:
    """0 if everything worked and nothing is left."""
    console, registry = console_for(sys.stdout), Registry()
    registry.refuse_if_up(NAME)
    gpus = local_gpus()
    spec = demo_spec(gpus.count)
    console.rule(f"starting 1 prefill, 1 decode and 2 expert workers on {gpus.told if gpus.count else 'the CPU'}")
    if gpus.problem and gpus.unused:
        console.print(gpus.unused, style="yellow", markup=False)
    begun = time.monotonic()
    started = start(spec, check(spec), registry, TIMEOUT_S, detach=False)
    try:
        with signals_stop_it(started, lambda: console.print("stopping")), StartProgress(console) as progress:
            wait_until_ready(started, registry, progress.tell)
        console.print(f"ready after {time.monotonic() - begun:.0f} s")
        _show_both(spec, console)
        console.rule("what ran where")
        console.print(where_table(status(NAME, registry)))
    finally:
        left = _shut_down(started, console)
    return 1 if left else 0


def demo_spec(num_gpus: int = 0) -> ClusterSpec:
    """Its four workers share the GPUs there are, as evenly as that goes."""
    http_port, grpc_port = free_ports(2)
    gpus = 1 / math.ceil(4 / num_gpus) if num_gpus else 0.0
    return from_dict(
        {
            "name": NAME,
            "prefill": {"workers": 1, "gpus": gpus},
            "decode": {"workers": 1, "gpus": gpus},
            "experts": {"workers": 2, "replicas": 2, "gpus": gpus},
            "engine": {"kv_tokens": 65536},
            "front_end": {"http_port": http_port, "grpc_port": grpc_port},
        }
    )


def where_table(found: Row) -> Table:
    """Tokens: rows an attention worker computed, rows an expert worker was sent. Hops: dispatches out, or answered."""
    table = Table(box=None, header_style="bold")
    for title in ("worker", "role", "pid", "tokens", "hops"):
        table.add_column(title, justify="right" if title in ("pid", "tokens", "hops") else "left")
    for worker in found["workers"]:
        values = (worker["name"], worker["role"], worker["pid"], worker["tokens"], worker["hops"])
        table.add_row(*[str(value) for value in values])
    return table


def _show_both(spec: ClusterSpec, console: Console) -> None:
    front = spec.front_end
    console.rule("gRPC")
    console.out(GRPC_PROMPT, end="", style="bold", highlight=False)
    sampling = pb.Sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=SEED)
    generate(Line(f"{front.host}:{front.grpc_port}"), GRPC_PROMPT, sampling, console)
    console.rule("OpenAI HTTP")
    console.out(HTTP_PROMPT, end="", style="bold", highlight=False)
    for text in _stream_http(f"http://{front.host}:{front.http_port}/v1", spec.served_name):
        console.out(text, end="", highlight=False)
    console.out("")


def _stream_http(base_url: str, model: str) -> Iterator[str]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        chunks = client.completions.create(
            model=model, prompt=HTTP_PROMPT, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=SEED, stream=True
        )
        for chunk in chunks:
            yield from (choice.text for choice in chunk.choices)


def _shut_down(started: Started, console: Console) -> bool:
    everybody = started.record.processes()
    started.child.terminate()
    code = keep(started)
    left = wait_gone(everybody, LEAVE_S)
    if left:
        console.print(f"still running: pids {', '.join(str(process.pid) for process in left)}", style="red")
    else:
        console.print(f"shut down: {len(everybody)} processes ended, none left")
    return bool(left) or code != 0
