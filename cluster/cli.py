"""The `braid` command: argument parsing here, everything else imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BraidError, SpecError

if TYPE_CHECKING:
    from . import braid_v1_pb2 as pb
    from .talk import Line

DEFAULT_NAME = "braid"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for what the user must correct, 1 for what went wrong, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return _guarded(lambda: _train(arguments[1:]))
    args = _parser().parse_args(arguments)
    return _guarded(lambda: args.run(args))


def _guarded(command: Callable[[], int]) -> int:
    try:
        return command()
    except (SpecError, ValueError) as error:
        return _fail(error, 2)
    except (BraidError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception, code: int) -> int:
    print(f"braid: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="braid", description="Serves DeepSeek-V3-family models from an elastic Ray cluster."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_up(commands)
    _add_status_and_down(commands)
    _add_talk(commands)
    _add_model_tools(commands)
    demo = commands.add_parser("demo", help="start a small cluster, stream two prompts, show what ran where")
    demo.set_defaults(run=_demo)
    show = commands.add_parser("version", help="print the version")
    show.set_defaults(run=_version)
    return parser


def _add_up(commands: Any) -> None:
    up = commands.add_parser("up", help="start a cluster and keep it until Ctrl-C")
    up.add_argument("spec", nargs="?", type=Path, metavar="SPEC.yaml", help="a ClusterSpec; flags win over it")
    up.add_argument("--name", help=f"default {DEFAULT_NAME}")
    up.add_argument("--detach", action="store_true", help="return when the cluster is ready and leave it running")
    up.add_argument("--model", metavar="DIR", help="a Hugging Face checkpoint; default: the bundled model")
    up.add_argument("--dtype", choices=["auto", "float32", "bfloat16"])
    up.add_argument("--prefill", type=int, metavar="N", help="prefill workers; 0: the decode workers do both")
    up.add_argument("--decode", type=int, metavar="N", help="decode workers")
    up.add_argument("--experts", metavar="N|colocated", help="expert workers, or experts inside attention workers")
    up.add_argument("--http-port", type=int, metavar="P")
    up.add_argument("--grpc-port", type=int, metavar="P")
    up.add_argument("--address", metavar="A", help="an existing Ray cluster; default: a local Ray of our own")
    up.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="seconds to be ready in; default 600")
    up.set_defaults(run=_up)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds


def _add_status_and_down(commands: Any) -> None:
    for name, run, told in (
        ("status", _status, "show workers, expert map and load"),
        ("down", _down, "stop a cluster and leave nothing behind"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument("--name", default=DEFAULT_NAME)
        command.add_argument("--address", metavar="A", help="the Ray it runs on, when it was started elsewhere")
        command.set_defaults(run=run)
        if name == "status":
            command.add_argument("--json", action="store_true")


def _add_talk(commands: Any) -> None:
    generate = commands.add_parser("generate", help="complete a prompt over gRPC")
    generate.add_argument("prompt")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", help="talk to the model over gRPC")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        command.add_argument("--name", default=DEFAULT_NAME)
        command.add_argument("--target", metavar="HOST:PORT", help="a gRPC endpoint; default: the named cluster's")
        command.add_argument("--api-key-file", type=Path, metavar="FILE", help="its first key is sent")
        command.add_argument("--max-tokens", type=int)
        command.add_argument("--temperature", type=float)
        command.add_argument("--top-p", type=float)
        command.add_argument("--top-k", type=int, default=0)
        command.add_argument("--min-p", type=float, default=0.0)
        command.add_argument("--seed", type=int)
        command.add_argument("--stop", action="append", default=[], metavar="TEXT")


def _add_model_tools(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="parameters, bytes and licences of a checkpoint or config.json")
    inspect.add_argument("path", type=Path, metavar="PATH_OR_CONFIG")
    inspect.set_defaults(run=_inspect)
    convert = commands.add_parser("convert", help="rewrite a checkpoint in another precision, resumable")
    convert.add_argument("src", type=Path)
    convert.add_argument("dst", type=Path)
    convert.add_argument("--to", choices=["bfloat16", "fp8"], required=True)
    convert.set_defaults(run=_convert)
    commands.add_parser("train", help="train a small model on the Python standard library", add_help=False)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Flags that were given, in the shape of the spec."""
    given = {
        "name": args.name,
        "ray_address": args.address,
        "model": {"path": args.model and str(Path(args.model).expanduser().resolve()), "dtype": args.dtype},
        "prefill": {"workers": args.prefill},
        "decode": {"workers": args.decode},
        "front_end": {"http_port": args.http_port, "grpc_port": args.grpc_port},
        "experts": _experts(args.experts),
    }
    if args.model == "bundled":
        given["model"]["path"] = "bundled"
    return _without_none(given)


def _experts(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if text == "colocated":
        return {"colocated": True}
    if not text.lstrip("-").isdigit():
        raise SpecError(f"--experts: expected a number of workers or 'colocated', got {text!r}")
    return {"workers": int(text)}


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _without_none(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


def _up(args: argparse.Namespace) -> int:
    from .registry import Registry
    from .spec import load_spec
    from .terminal import StartProgress, console_for, render_status
    from .up import check, keep, signals_stop_it, start, unused_gpus, wait_until_ready

    console = console_for(sys.stderr)
    spec = load_spec(args.spec, _overrides(args))
    registry = Registry()
    registry.refuse_if_up(spec.name)
    facts = check(spec)
    for notice in (*facts.notices, *unused_gpus(spec)):
        console.print(notice, style="yellow", markup=False)
    started = start(spec, facts, registry, args.timeout, args.detach)
    with signals_stop_it(started, lambda: console.print("stopping", style="dim")):
        with StartProgress(console) as progress:
            status = wait_until_ready(started, registry, progress.tell)
        console.print(render_status(status))
        if args.detach:
            return 0
        console.print("Ctrl-C stops it", style="dim")
        return keep(started)


def _status(args: argparse.Namespace) -> int:
    from .registry import Registry
    from .status import status, status_on_ray
    from .terminal import console_for, render_status

    found = status_on_ray(args.name, args.address) if args.address else status(args.name, Registry())
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        console_for(sys.stdout).print(render_status(found))
    return 0


def _down(args: argparse.Namespace) -> int:
    from .down import down, down_on_ray
    from .registry import Registry

    registry = Registry()
    here = registry.find(args.name)
    if args.address and (here is None or here.ray_address != args.address):
        down_on_ray(args.name, args.address)
    elif killed := down(args.name, registry):  # its supervisor is on this machine, and must end too
        print(f"cluster {args.name} is down; had to kill pids {', '.join(map(str, killed))}")
        return 0
    print(f"cluster {args.name} is down")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from rich.console import Console

    from .talk import generate

    generate(_line(args), args.prompt, _sampling(args), Console())
    return 0


def _chat(args: argparse.Namespace) -> int:
    from rich.console import Console

    from .talk import chat

    chat(_line(args), _sampling(args), Console())
    return 0


def _line(args: argparse.Namespace) -> Line:
    from .front_check import address, reachable
    from .registry import Registry
    from .talk import Line

    key = _first_key(args.api_key_file) if args.api_key_file else None
    if args.target:
        return Line(args.target, key)
    record = Registry().get(args.name)
    return Line(address(reachable(record.host), record.grpc_port), key)


def _first_key(file: Path) -> str:
    from .callers import api_keys_in

    for key in api_keys_in(file.read_text()):
        return key
    raise SpecError(f"--api-key-file: {file} holds no key: put one on a line of its own")


def _sampling(args: argparse.Namespace) -> pb.Sampling:
    from . import braid_v1_pb2 as pb

    try:
        return pb.Sampling(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            seed=args.seed,
            stop=args.stop,
        )
    except ValueError as error:
        raise SpecError(f"a sampling flag is out of range: {error}") from None


def _inspect(args: argparse.Namespace) -> int:
    from ..model.inventory import describe, render
    from .local_gpus import local_gpus
    from .terminal import console_for

    console = console_for(sys.stdout)
    console.print(render(describe(args.path)))
    if (gpus := local_gpus()).is_there:
        console.print(f"on this machine: {gpus.problem or gpus.told}", markup=False)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from ..model.convert import convert

    with Progress() as bar:
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int, file: str) -> None:
            bar.update(task, completed=done, total=total, description=file)

        convert(args.src, args.dst, args.to, progress)
    return 0


def _train(arguments: Sequence[str]) -> int:
    from ..model import train

    parser = argparse.ArgumentParser(prog="braid train", description=train.__doc__)
    train.add_arguments(parser)
    train.run(parser.parse_args(arguments))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import demo

    return demo()


def _version(args: argparse.Namespace) -> int:
    print(f"braid {version('braid-serve')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
