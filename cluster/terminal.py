"""What people see: progress while a cluster starts, tables of its state, the expert map as a small picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]
MAP_WIDTH = 64
COLOURS = {"serving": "green", "degraded": "yellow", "live": "green", "lost": "red", "starting": "cyan"}


def console_for(stream: TextIO) -> Console:
    """Logs and pipes have no width: tables there must not be squeezed into 80 columns."""
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False)


class StartProgress:
    """One bar for the bytes of all workers' weights; on anything but a terminal, one line per change."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        self.task: TaskID = self.progress.add_task("starting", total=None)
        self.said = ""

    def __enter__(self) -> StartProgress:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def tell(self, news: Row) -> None:
        words, done, total = describe_start(news)
        self.progress.update(self.task, description=words, completed=done, total=total or None)
        if not self.console.is_terminal and words != self.said:
            self.console.print(words)
        self.said = words


def describe_start(news: Row) -> tuple[str, int, int]:
    """(words, bytes loaded, bytes to load) from the supervisor's news."""
    if "status" not in news:
        return str(news.get("doing", "starting")), 0, 0
    workers: list[Row] = news["status"]["workers"]
    loading = [worker["loading"] for worker in workers]
    done = sum(report.get("done_bytes", 0) for report in loading)
    total = sum(report.get("total_bytes", 0) for report in loading)
    ready = sum(worker["state"] in ("ready", "live") for worker in workers)
    if ready == len(workers):
        return "workers ready, waiting for links and front ends", done, total
    phases = sorted({report["phase"] for report in loading if report.get("phase") not in (None, "ready")})
    return f"{ready} of {len(workers)} workers ready ({', '.join(phases) or 'placing'})", done, total


def render_status(status: Row) -> RenderableType:
    return Group(*_status_parts(status))


def _status_parts(status: Row) -> Iterator[RenderableType]:
    state = status["state"]
    yield Text.assemble("cluster ", (status["name"], "bold"), " is ", (state, COLOURS.get(state, "")))
    if "model" not in status:
        return
    model, ends = status["model"], status["endpoints"]
    yield Text(f"model {model['name']} ({model['architecture']}) from {model['path']}")
    yield Text(f"HTTP {ends['http']}/v1   gRPC {ends['grpc']}   view epoch {status['epoch']}")
    yield from (Text(notice, style="yellow") for notice in model["notices"])
    yield from (Text(f"! {problem}", style="red") for problem in status["problems"])
    yield worker_table(status["workers"])
    if status["expert_map"] is not None:
        yield Text(f"expert map, epoch {status['expert_map']['epoch']}, {len(status['expert_map']['layers'])} layers:")
        yield from (Text(line) for line in expert_picture(status))
    load = status["load"]
    used = load["total_blocks"] - load["free_blocks"]
    told = f"load: {load['sequences']} sequences, {load['waiting']} waiting, {used}/{load['total_blocks']} KV blocks"
    if load["prefix_hit_rate"] is not None:
        told += f", {load['prefix_hit_rate']:.0%} of prompt tokens found in the cache"
    yield Text(told)


def worker_table(workers: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("worker", "role", "node", "device", "pid", "life", "state", "sequences", "free blocks", "tokens", "hops")
    for title in titles:
        table.add_column(title, justify="right" if title in ("pid", "life", "sequences", "tokens", "hops") else "left")
    for worker in workers:
        blocks = "" if worker["free_blocks"] is None else f"{worker['free_blocks']}/{worker['total_blocks']}"
        colour = COLOURS.get(worker["state"], "white")
        table.add_row(
            worker["name"],
            worker["role"],
            escape(str(worker["node"] or "")),
            device_words(worker),
            str(worker["pid"] or ""),
            str(worker["incarnation"]),
            f"[{colour}]{worker['state']}[/]",
            "" if worker["free_blocks"] is None else str(worker["sequences"]),
            blocks,
            str(worker["tokens"]),
            str(worker["hops"]),
        )
    return table


def device_words(worker: Row) -> str:
    """Such as: H100 80GB HBM3, 9/20 GiB, of which the second is the worker's share."""
    name = str(worker.get("device") or "").removeprefix("NVIDIA ")
    if not worker.get("device_memory"):
        return name
    used, share = (worker[key] / 2**30 for key in ("device_memory_used", "device_memory"))
    return f"{name}, {used:.0f}/{share:.0f} GiB"


def expert_picture(status: Row) -> list[str]:
    """One line per expert worker, one cell per expert (or per equal share of them), and the least replicas below."""
    replicas: list[int] = status["expert_map"]["replicas"]
    cells = _shares(len(replicas))
    lines = []
    for worker in status["workers"]:
        if worker["experts"] is not None:
            held = set(worker["experts"]) if worker["state"] != "lost" else set()
            marks = ["■" if held.issuperset(cell) else "▪" if held.intersection(cell) else "·" for cell in cells]
            lines.append(f"  {worker['name']:<10} {''.join(marks)}")
    fewest = "".join(_digit(min(replicas[expert] for expert in cell)) for cell in cells)
    return [*lines, f"  {'replicas':<10} {fewest}"]


def _shares(num_experts: int) -> list[range]:
    cells = min(num_experts, MAP_WIDTH)
    return [range(cell * num_experts // cells, (cell + 1) * num_experts // cells) for cell in range(cells)]


def _digit(count: int) -> str:
    return str(count) if count < 10 else "+"
