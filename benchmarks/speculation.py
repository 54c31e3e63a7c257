"""Decode speed with and without drafts on the bundled model: `python -m braid.benchmarks.speculation [--out FILE]`.

Held-out text as prompts. The two engines, which hold the same weights, take turns on the same prompts; every answer is
compared. Run it from outside the repository's folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import braid
from braid.model.corpus import encode_files, held_out_windows, read_corpus
from braid.model.sampling_params import SamplingParams
from braid.model.train_checkpoint import load_tokenizer
from braid.tests.processes import ProcessCluster

BUNDLED = Path(braid.__file__).parent / "model" / "bundled"
CONCURRENCY = (1, 8, 32)
TEMPERATURES = (0.0, 1.0)
PROMPT_TOKENS, NEW_TOKENS = 128, 256


def held_out(count: int) -> list[list[int]]:
    ids = encode_files(load_tokenizer(BUNDLED), read_corpus().held_out)
    prompts: list[list[int]] = held_out_windows(ids, PROMPT_TOKENS, count)[:, :PROMPT_TOKENS].tolist()
    return prompts


def counters(cluster: ProcessCluster) -> dict[str, float]:
    """As of now: LOAD reports carry them about once a second, and with the end of every request."""
    cluster.front.wait_baseline()
    found: dict[str, float] = cluster.front.loads["decode-0"]["counters"]
    return found


def measure(cluster: ProcessCluster, prompts: list[list[int]], temperature: float) -> dict[str, Any]:
    """Decode tokens a second between the first token of the last request to get one and the end of the first."""
    before, front = counters(cluster), cluster.front
    names = [f"r{len(front.answers) + index}" for index in range(len(prompts))]
    for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        params = SamplingParams(NEW_TOKENS, temperature=temperature, seed=index, ignore_eos=True)
        cluster.submit(name, prompt, params)
    answers = [front.answers[name] for name in names]
    front.wait(lambda: all(answer.tokens for answer in answers), "a first token of each")
    started, already = time.perf_counter(), sum(len(answer.tokens) for answer in answers)
    front.wait(lambda: any(answer.finish for answer in answers), "the end of one")
    rate = (sum(len(answer.tokens) for answer in answers) - already) / (time.perf_counter() - started)
    front.finish(*names)
    spent = counters(cluster)
    told = ("steps", "drafted_tokens", "accepted_tokens", "forward_s", "host_s")
    return {
        "tokens_per_s": rate,
        "answers": [answer.token_ids for answer in answers],
        **{name: spent.get(name, 0) - before.get(name, 0) for name in told},
    }


def compare(
    plain: ProcessCluster, drafting: ProcessCluster, prompts: list[list[int]], temperature: float, rounds: int
) -> dict[str, Any]:
    """Median, least and most of the rounds; the ratio is the median of the rounds' own ratios. Each has own prompts."""
    turns = []
    for number in range(rounds + 1):  # the first one warms up
        count = len(prompts) // (rounds + 1)
        own = prompts[number * count : (number + 1) * count]
        turns.append([measure(cluster, own, temperature) for cluster in (plain, drafting)])
    del turns[0]
    assert all(ours["answers"] == theirs["answers"] for ours, theirs in turns), "a draft has changed an answer"
    ratios = sorted(theirs["tokens_per_s"] / ours["tokens_per_s"] for ours, theirs in turns)
    result: dict[str, Any] = {"ratio": statistics.median(ratios), "ratio_spread": [ratios[0], ratios[-1]]}
    for place, name in enumerate(("without", "with")):
        runs = [turn[place] for turn in turns]
        rates = sorted(run["tokens_per_s"] for run in runs)
        steps = sum(run["steps"] for run in runs)
        result[name] = {
            "tokens_per_s": statistics.median(rates),
            "spread": [rates[0], rates[-1]],
            "tokens_per_step": rounds * NEW_TOKENS / steps,
            "forward_us_per_step": 1e6 * sum(run["forward_s"] for run in runs) / steps,
            "host_us_per_step": 1e6 * sum(run["host_s"] for run in runs) / steps,
        }
    drafted = sum(theirs["drafted_tokens"] for _, theirs in turns)
    accepted = sum(theirs["accepted_tokens"] for _, theirs in turns)
    return {**result, "drafted": drafted, "accepted": accepted, "acceptance": accepted / drafted if drafted else None}


def run(rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:

        def cluster(speculation: bool) -> ProcessCluster:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            limits: dict[str, Any] = {"threads": threads, "speculation": speculation}
            return stack.enter_context(
                closing(ProcessCluster(BUNDLED, folder, 0, 1, "colocated", "bfloat16", **limits))
            )

        plain, drafting = cluster(False), cluster(True)
        for temperature in TEMPERATURES:
            for concurrency in CONCURRENCY:
                found = compare(plain, drafting, held_out(concurrency * (rounds + 1)), temperature, rounds)
                yield {"temperature": temperature, "concurrency": concurrency, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for row in run(args.rounds, args.threads):
        rows.append(row)
        acceptance = row["acceptance"]
        print(
            f"temperature {row['temperature']:g}, {row['concurrency']:2} at once: "
            f"{row['without']['tokens_per_s']:7.0f} -> {row['with']['tokens_per_s']:7.0f} tokens/s, "
            f"ratio {row['ratio']:.2f} ({row['ratio_spread'][0]:.2f} to {row['ratio_spread'][1]:.2f}), "
            f"{row['with']['tokens_per_step']:.2f} tokens a step, "
            f"acceptance {'-' if acceptance is None else f'{acceptance:.0%}'} of {row['drafted']:.0f}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps({"model": "bundled", "dtype": "bfloat16", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
