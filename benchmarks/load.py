"""Load on a running cluster over HTTP, made by a program that is not ours: aiperf, Poisson arrivals at several rates.

    make bench-load                                                  the bundled model, colocated; about 5 minutes
    python benchmarks/load.py --layout disaggregated --rates 1 2 4
    python benchmarks/load.py --url http://127.0.0.1:8000 --served-name braid-tiny --tokenizer model/bundled

Without --url a cluster is started and ended. The tokenizer is a folder, so nothing is fetched from a hub. aiperf
counts the tokens of an answer by tokenizing its text again, which may differ from those sent; times are of chunks as
they came.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from braid.benchmarks import machine
from braid.benchmarks.checkpoints import BUNDLED
from braid.benchmarks.compare import work_dir
from braid.benchmarks.contenders import CLUSTERS
from braid.benchmarks.progress import Told
from braid.benchmarks.report import update_page
from braid.benchmarks.rivals.install import BENCH, is_installed

RESULTS = Path(__file__).resolve().parent / "results" / "load.json"
LOG = BENCH / "aiperf.log"
BRAID, PORT, NAME = Path(sys.executable).parent / "braid", 18731, "bench-load"
AIPERF_TIMEOUT_S = 300.0  # beyond what the arrivals take
PERCENTILES = ("p50", "p90", "p99")
COLUMNS = ["requests/s asked", "requests/s", "tokens/s", *[f"TTFT ms {p}" for p in PERCENTILES]]
COLUMNS += [f"ITL ms {p}" for p in PERCENTILES] + ["requests", "failed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="what the cluster serves: bundled, or a checkpoint's folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layout", default="colocated", choices=["colocated", "disaggregated"])
    parser.add_argument("--url", help="of a cluster that runs already")
    parser.add_argument("--served-name", default="braid-tiny")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], help="requests per second")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each rate lasts")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--out", type=Path, help="instead of benchmarks/results/load.json; then the page stays as it is"
    )
    args = parser.parse_args()
    if not is_installed("load"):
        parser.error("aiperf is not installed; run: python -m braid.benchmarks.rivals.install load")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    rows = []
    with Told() as told:
        told.begin("load")
        told.expect(len(args.rates))
        told.say("starting a cluster")
        with cluster(args) as url:
            for rate in args.rates:
                told.say(f"{rate:g} requests/s")
                rows.append(row_of(rate, run_aiperf(args, url, rate)))
                told.advance()
    result = {"machine": machine.describe(), "columns": COLUMNS, "rows": rows, "about": about(args)}
    out = args.out or RESULTS
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")
    if args.out is None:
        update_page(result, "load")


@contextmanager
def cluster(args: argparse.Namespace) -> Iterator[str]:
    """The URL of a cluster that is ours for the time, unless --url names another."""
    if args.url:
        yield args.url
        return
    spec, ports = CLUSTERS / f"{args.layout}.yaml", ["--http-port", str(PORT), "--grpc-port", str(PORT + 1)]
    options = ["--name", NAME, "--model", args.model, "--dtype", args.dtype, "--detach", *ports]
    started = subprocess.run(
        [str(BRAID), "up", str(spec), *options], cwd=work_dir(), capture_output=True, text=True, check=False
    )
    if started.returncode:
        raise SystemExit(f"braid up failed: {started.stderr.strip() or started.stdout.strip()}")
    try:
        yield f"http://127.0.0.1:{PORT}"
    finally:
        subprocess.run([str(BRAID), "down", "--name", NAME], cwd=work_dir(), capture_output=True, check=False)


def run_aiperf(args: argparse.Namespace, url: str, rate: float) -> Mapping[str, Any]:
    """Its summary of one rate."""
    folder, count = BENCH / "aiperf" / f"{rate:g}", max(8, round(rate * args.seconds))
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's summary must not pass for this one's
    command = [str(BENCH / "load" / "bin" / "aiperf"), "profile", "--model", args.served_name, "--url", url]
    command += ["--endpoint-type", "completions", "--streaming", "--tokenizer", str(args.tokenizer.resolve())]
    command += ["--request-rate", f"{rate:g}", "--arrival-pattern", "poisson", "--random-seed", "1"]
    command += ["--request-count", str(count), "--warmup-request-count", "2"]
    command += ["--synthetic-input-tokens-mean", str(args.prompt_tokens), "--synthetic-input-tokens-stddev", "0"]
    command += ["--output-tokens-mean", str(args.new_tokens), "--output-tokens-stddev", "0"]
    command += ["--use-legacy-max-tokens", "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"]
    command += ["--workers-max", "1", "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"]
    command += ["--output-artifact-dir", str(folder)]
    code = run(command, count / rate + AIPERF_TIMEOUT_S)
    summary = folder / "profile_export_aiperf.json"
    if code or not summary.exists():
        raise SystemExit(f"aiperf failed at {rate:g} requests/s:\n{LOG.read_text(errors='replace')[-2000:]}")
    told: Mapping[str, Any] = json.loads(summary.read_text())
    return told


def run(command: Sequence[str], timeout_s: float) -> int:
    """Its exit code; what it prints goes to LOG. However this ends, no process of it is left."""
    env = os.environ | {"NO_PROXY": "127.0.0.1,localhost"}
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            list(command), cwd=work_dir(), env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{command[0]} did not end within {timeout_s:g} s; see {LOG}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def row_of(rate: float, told: Mapping[str, Any]) -> list[float]:
    """`told`: aiperf's summary, a figure with percentiles per metric."""
    times = [told[metric][p] for metric in ("time_to_first_token", "inter_token_latency") for p in PERCENTILES]
    speed = [told["request_throughput"]["avg"], told["output_token_throughput"]["avg"]]
    failed = told.get("error_request_count") or {}
    return [rate, *speed, *times, int(told["request_count"]["avg"]), int(failed.get("avg", 0))]


def about(args: argparse.Namespace) -> str:
    model = args.url or f"{args.model} in {args.dtype}, {args.layout}"
    return (
        f"{model}: aiperf, Poisson arrivals, prompts of about {args.prompt_tokens} tokens, {args.new_tokens} new "
        "tokens, greedy, streamed over HTTP; aiperf itself runs on the same cores."
    )


if __name__ == "__main__":
    main()
