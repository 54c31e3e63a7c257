"""Braid and its rivals on one checkpoint, prompts and cores, in one run: tables, a picture, JSON.

    make bench                                  installs the rivals, then the whole run (about 25 minutes)
    python benchmarks/compare.py --quick        one small round, to see that everything works (4 minutes)
    python benchmarks/compare.py --only bf16    one section; the others keep what was measured before

Every engine of a section is up during all of it and frozen (SIGSTOP) while it is not its turn, so one at a time has the
cores. The order changes from round to round, and so do the prompts, which are the same for all. One that fails costs
its own row. Nothing is left running.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from braid.benchmarks import figures, machine
from braid.benchmarks.checkpoints import VOCAB_SIZE, make
from braid.benchmarks.contenders import READY_TIMEOUT_S, Contender, Section, models, quick_sections, sections
from braid.benchmarks.progress import Told
from braid.benchmarks.report import update_page
from braid.benchmarks.rivals.engine_process import EngineFailed, EngineProcess, run_once
from braid.benchmarks.rivals.install import BENCH, python_of
from braid.benchmarks.roofline import Machine, decode_work, measure_machine, prefill_work, typical
from braid.model.config import ModelConfig

RESULTS = Path(__file__).resolve().parent / "results" / "compare.json"
JOB_TIMEOUT_S = 900.0
Prompts = list[list[int]]
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small round; writes no page")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="bf16, fp32, http")
    parser.add_argument("--rounds", type=int, help="instead of each section's own number")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/compare.json")
    args = parser.parse_args()
    threads = os.cpu_count() or 1
    known = {section.name: section for section in (quick_sections if args.quick else sections)(threads)}
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [section for name, section in known.items() if name in (args.only or known)]
    out = args.out or (BENCH / "quick.json" if args.quick else RESULTS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with Told() as told:
        found = json.loads(out.read_text()) if out.exists() and args.only else {"sections": {}}
        found["machine"] = machine.describe()
        for section in chosen:
            found["sections"][section.name] = run_section(section, args.rounds or section.rounds, threads, told)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {out}")
    if not args.quick:
        update_page(found)


def run_section(section: Section, rounds: int, threads: int, progress: Told) -> Result:
    progress.begin(section.title)
    try:
        prepare(section)
    except EngineFailed as error:
        progress.say(f"no GGUF for llama.cpp: {error}")
    seen = [measure(section, threads)]
    engines: dict[str, Result] = {}
    with ExitStack() as stack:
        running: dict[str, EngineProcess] = {}
        for contender in section.contenders:
            progress.say(f"starting {contender.name}")
            engines[contender.name] = told = {"failed": contender.missing(), "is_ours": contender.is_ours}
            if told["failed"] is None:
                try:
                    running[contender.name] = start(contender, section, stack, told)
                except EngineFailed as error:
                    told["failed"] = str(error)
        progress.expect(sum(min(rounds, c.rounds or rounds) for c in section.contenders if c.name in running))
        for round_number in range(rounds):
            seen.append(measure(section, threads))
            for contender in turns(section.contenders, round_number):
                if contender.name not in running:
                    continue
                progress.say(f"round {round_number + 1} of {rounds}: {contender.name}")
                try:
                    engine = running[contender.name]
                    with engine.awake():
                        take_turn(section, contender, engine, round_number, engines[contender.name])
                except EngineFailed as error:
                    engines[contender.name]["failed"] = str(error)
                    running.pop(contender.name).close()
                progress.advance()
    compare_answers(engines)
    seen.append(measure(section, threads))
    usual = typical(seen)
    return {
        "title": section.title,
        "date": machine.describe()["date"],
        "dtype": section.dtype,
        "checkpoint": section.checkpoint,
        "new_tokens": section.new_tokens,
        "prompt_tokens": section.prompt_tokens,
        "long_tokens": section.long_tokens,
        "concurrency": list(section.concurrency),
        "read_gb_s": usual.read_gb_s,
        "read_gb_s_seen": [one.read_gb_s for one in seen],
        "matmul_gflop_s": usual.matmul_gflop_s,
        "floor": floor(section, usual),
        "engines": engines,
    }


def prepare(section: Section) -> None:
    """The checkpoint in both forms; random numbers take seconds, so they are kept but never shipped."""
    checkpoint = make(section.checkpoint, models() / section.checkpoint)
    gguf, rival = checkpoint.with_suffix(".gguf"), python_of("llamacpp")
    if rival.exists() and not gguf.exists():
        run_once([str(rival), "-m", "braid.benchmarks.rivals.gguf_file", str(checkpoint), str(gguf)], work_dir())


def start(contender: Contender, section: Section, stack: ExitStack, told: Result) -> EngineProcess:
    """The last of `section.starts` goes on; each is timed alone, as the others are frozen. Raises EngineFailed."""
    seconds = []
    for index in range(section.starts):
        name = f"{section.name}-{contender.name.replace(' ', '-').replace(',', '')}"
        engine = EngineProcess(name, contender.command, BENCH / f"{name}.log", work_dir())
        stack.callback(engine.close)
        engine.wait_ready(READY_TIMEOUT_S)
        seconds.append(engine.start_s)
        if index < section.starts - 1:
            engine.close()
    told |= {"version": engine.version, "start_s": seconds, "figures": {}, "answers": {}}
    return engine


def turns(contenders: Sequence[Contender], round_number: int) -> Iterator[Contender]:
    """Each round begins with another engine; those whose rounds are bounded stop taking part."""
    begin = round_number % max(len(contenders), 1)
    for contender in [*contenders[begin:], *contenders[:begin]]:
        if contender.rounds is None or round_number < contender.rounds:
            yield contender


def take_turn(section: Section, contender: Contender, engine: EngineProcess, round_number: int, told: Result) -> None:
    """Raises EngineFailed."""

    def note(figure: str, value: float) -> None:
        told["figures"].setdefault(figure, []).append(value)

    new_tokens = min(section.new_tokens, contender.new_tokens or section.new_tokens)
    for index, concurrency in enumerate(section.concurrency):
        prompts = draw_prompts(concurrency, section.prompt_tokens, round_number, index)
        answers = engine.run(prompts, new_tokens, JOB_TIMEOUT_S)
        times = answers.times_s
        note(f"decode_c{concurrency}", figures.decode_tokens_per_s(times))
        note(f"end_to_end_c{concurrency}", figures.end_to_end_tokens_per_s(times))
        note(f"tpot_ms_c{concurrency}", figures.tpot_ms(times))
        note(f"ttft_s_c{concurrency}", figures.time_to_first_token_s(times))
        note(f"prefill_c{concurrency}", figures.prefill_tokens_per_s(times, concurrency * section.prompt_tokens))
        if round_number == 0:
            told["answers"][str(concurrency)] = [ids[:8] for ids in answers.token_ids]
    long_prompt = draw_prompts(1, section.long_tokens, round_number, len(section.concurrency))
    times = engine.run(long_prompt, 1, JOB_TIMEOUT_S).times_s
    note("ttft_long_s", figures.time_to_first_token_s(times))
    told |= {"peak_mib": engine.peak_mib, "others_cores": engine.others_cores}


def draw_prompts(count: int, length: int, round_number: int, job: int) -> Prompts:
    """Random tokens, new in every round and job: no engine's prefix cache can know them."""
    generator = np.random.default_rng([round_number, job])
    prompts: Prompts = generator.integers(3, VOCAB_SIZE, (count, length)).tolist()
    return prompts


def compare_answers(engines: dict[str, Result]) -> None:
    """Share of answers whose first token is that of our first engine: the same model is computed, or it is not."""
    ours: Result = next((e["answers"] for e in engines.values() if e["is_ours"] and e.get("answers")), {})
    for engine in engines.values():
        pairs = [(a, ours[c]) for c, a in engine.pop("answers", {}).items() if c in ours]
        if pairs:
            mine, theirs = ([ids for pair in pairs for ids in pair[side]] for side in (0, 1))
            engine["same_first_token"] = figures.agreement(mine, theirs)


def measure(section: Section, threads: int) -> Machine:
    return measure_machine(torch.float32 if section.dtype == "fp32" else torch.bfloat16, threads)


def floor(section: Section, limits: Machine) -> dict[str, float]:
    config, itemsize = ModelConfig.from_path(models() / section.checkpoint), 4 if section.dtype == "fp32" else 2
    mean_context = section.prompt_tokens + section.new_tokens // 2
    found = {
        f"decode_c{num}": num / decode_work(config, num, mean_context).seconds(limits, itemsize)
        for num in section.concurrency
    }
    return found | {"ttft_long_s": prefill_work(config, section.long_tokens).seconds(limits, itemsize)}


def work_dir() -> Path:
    """Where drivers start: a folder in which `braid` is this checkout, for environments without it."""
    work, link = BENCH / "work", BENCH / "work" / "braid"
    work.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
    return work


if __name__ == "__main__":
    main()
