"""Turns results into Markdown and puts it between the marks of docs/performance.md: text in, text out.

python benchmarks/report.py     writes tables and pictures again from the JSON in benchmarks/results
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from braid.benchmarks.figures import best_of, summary

ROOT = Path(__file__).resolve().parents[1]
PAGE, README, PICTURES = ROOT / "docs" / "performance.md", ROOT / "README.md", ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
Result = Mapping[str, Any]
Values = Sequence[float]


def main() -> None:
    for name in ("compare", "growth", "load"):
        if (path := RESULTS / f"{name}.json").exists():
            update_page(json.loads(path.read_text()), name)


def update_page(result: Result, name: str = "compare") -> None:
    """`name`: compare, growth or load."""
    from braid.benchmarks import pictures  # matplotlib is slow to import

    written = {"compare": comparison, "growth": growth, "load": load}[name](result)
    PAGE.write_text(put_between(PAGE.read_text(), name, written))
    if name == "compare":
        README.write_text(put_between(README.read_text(), name, short_table(result)))
    if name in pictures.DRAWN:
        pictures.DRAWN[name](result, PICTURES / f"performance-{name}.svg")


def put_between(page: str, mark: str, text: str) -> str:
    """Replaces what stands between `<!-- mark -->` and `<!-- end of mark -->`."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page lacks {begin} or {end}; put both where the tables belong")
    return page[: page.index(begin)] + f"{begin}\n{text}\n" + page[page.index(end) :]


def comparison(result: Result) -> str:
    parts = [_machine(result["machine"])]
    for name, section in result["sections"].items():
        other = result["sections"].get("fp32") if name == "bf16" else None
        parts += [f"### {section['title']}", engine_table(section, other), *remarks(section)]
    return "\n\n".join(parts)


def engine_table(section: Result, other: Result | None = None) -> str:
    """One row an engine, then the floor, then the ratios; `other`: the same engines in another precision."""
    columns = _columns(section)
    rows = [["engine", *[title for title, _, _ in columns]]]
    for name, engine in section["engines"].items():
        if engine["failed"]:
            rows.append([name, f"failed: {engine['failed']}".replace("|", "/"), *[""] * (len(columns) - 1)])
        else:
            rows.append([_bold(name, engine), *[cell(_values(engine, key), form) for _, key, form in columns]])
    floor = section["floor"]
    if floor:
        cells = [form(floor[key]) if key in floor else "" for _, key, form in columns]
        rows.append([floor_label(section), *cells])
    for label, ratio in ratios(section, other):
        rows.append([label, *[f"{ratio[key]:.2f}" if key in ratio else "" for _, key, _ in columns]])
    return table(rows)


def floor_label(section: Result) -> str:
    """Sections that were measured before the medians were kept have the best of what was seen."""
    seen = section.get("read_gb_s_seen")
    what, spread = ("floor", f" of {min(seen):.1f}..{max(seen):.1f}") if seen else ("floor of the best moment", "")
    return f"{what} ({section['read_gb_s']:.1f} GB/s{spread}, {section['matmul_gflop_s']:.0f} GFLOP/s)"


def ratios(section: Result, other: Result | None = None) -> Iterator[tuple[str, dict[str, float]]]:
    """Ours to the best rival, figure by figure, and disaggregated to colocated. Medians."""
    medians = _medians(section)
    ours = [name for name in medians if section["engines"][name]["is_ours"]]
    rivals = [name for name in medians if name not in ours]
    if ours and rivals:
        best = [medians[name] for name in rivals]
        yield f"{ours[0]} / best rival", _over(medians[ours[0]], best)
        if other is not None:
            best += [each for name, each in _medians(other).items() if not other["engines"][name]["is_ours"]]
            yield f"{ours[0]} / best rival in any precision", _over(medians[ours[0]], best)
    if len(ours) > 1:
        yield f"{ours[1]} / {ours[0]}", _over(medians[ours[1]], [medians[ours[0]]])
    if ours and section["floor"]:
        yield f"{ours[0]} / floor", _over(medians[ours[0]], [section["floor"]])


def _medians(section: Result) -> dict[str, dict[str, float]]:
    """By engine and figure, of those that did not fail."""
    return {
        name: {key: summary(_values(engine, key)).median for _, key, _ in _columns(section) if _values(engine, key)}
        for name, engine in section["engines"].items()
        if not engine["failed"]
    }


def remarks(section: Result) -> Iterator[str]:
    """What a reader must know to believe the table."""
    rounds = max((len(v) for e in section["engines"].values() for v in e.get("figures", {}).values()), default=0)
    starts = max((len(e.get("start_s", ())) for e in section["engines"].values()), default=0)
    yield (
        f"Checkpoint `{section['checkpoint']}`, prompts of {section['prompt_tokens']} tokens, {section['new_tokens']} "
        f"new tokens, greedy; medians of {rounds} rounds with least and most; {section['date']}. "
        f"Start-up, {starts} of each: from the start of the process until its first two answers. "
        "Memory: high-water mark, resident."
    )
    short = [name for name, e in section["engines"].items() if 0 < _rounds(e) < rounds]
    lines = [f"{name}: {_rounds(section['engines'][name])} of {rounds} rounds." for name in short]
    for name, engine in section["engines"].items():
        if not engine["failed"]:
            same = f", first tokens as ours: {engine['same_first_token']:.0%}" if "same_first_token" in engine else ""
            lines.append(f"{name}: {engine['version']}{same}, others used {engine['others_cores']:.2f} cores at most.")
    yield " ".join(lines)


def short_table(result: Result) -> str:
    """What fits into the README: medians of the BF16 section."""
    section = result["sections"].get("bf16")
    if section is None:
        return "(not measured yet)"
    keep = [*[f"decode_c{c}" for c in section["concurrency"]], "ttft_long_s", "start_s", "peak_mib"]
    columns = [column for column in _columns(section) if column[1] in keep]
    rows = [["BF16", *[title for title, _, _ in columns]]]
    for name, engine in section["engines"].items():
        values = [_values(engine, key) for _, key, _ in columns]
        cells = [form(summary(v).median) if v else "" for v, (_, _, form) in zip(values, columns, strict=True)]
        rows.append([_bold(name, engine), *(["failed", *cells[1:]] if engine["failed"] else cells)])
    floor = section["floor"]
    rows.append(["floor of this machine", *[form(floor[key]) if key in floor else "" for _, key, form in columns]])
    return f"{_machine(result['machine'])}\n\n{table(rows)}"


def growth(result: Result) -> str:
    parts = [_machine(result["machine"])]
    for curve in result["curves"].values():
        rows = [curve["columns"], *[[_number(value) for value in row] for row in curve["rows"]]]
        parts += [f"### {curve['title']}", table(rows), curve["about"]]
    return "\n\n".join(parts)


def load(result: Result) -> str:
    rows = [result["columns"], *[[_number(value) for value in row] for row in result["rows"]]]
    return "\n\n".join([_machine(result["machine"]), table(rows), result["about"]])


def cell(values: Values, form: Callable[[float], str]) -> str:
    """Median, and the spread where there is one."""
    if not values:
        return ""
    told = summary(values)
    spread = f" ({form(told.least)}..{form(told.most)})" if told.rounds > 1 else ""
    return form(told.median) + spread


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def _columns(section: Result) -> list[tuple[str, str, Callable[[float], str]]]:
    """Title, key and form of each figure."""
    most, long = max(section["concurrency"]), section["long_tokens"]
    decode = [(f"decode tokens/s, c = {c}", f"decode_c{c}", _number) for c in section["concurrency"]]
    return [
        *decode,
        (f"prefill tokens/s, c = {most}", f"prefill_c{most}", _number),
        (f"first token of {long:,}, s", "ttft_long_s", _number),
        ("start-up, s", "start_s", _number),
        ("peak memory, MiB", "peak_mib", _number),
    ]


def _over(mine: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By the best of the others in each figure."""
    found = {}
    for key, value in mine.items():
        held = {str(index): other[key] for index, other in enumerate(others) if key in other}
        if held:
            found[key] = value / held[best_of(held, key in ("ttft_long_s", "start_s", "peak_mib"))]
    return found


def _values(engine: Result, key: str) -> Values:
    if key == "start_s":
        starts: Values = engine.get("start_s", [])
        return starts
    if key == "peak_mib":
        return [engine["peak_mib"]] if "peak_mib" in engine else []
    values: Values = engine.get("figures", {}).get(key, [])
    return values


def _rounds(engine: Result) -> int:
    return max((len(values) for values in engine.get("figures", {}).values()), default=0)


def _machine(machine: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['name']}, {machine['memory_gib']} GiB, Python {machine['python']}, {versions}; {machine['date']}."


def _bold(name: str, engine: Result) -> str:
    return f"**{name}**" if engine["is_ours"] else name


def _number(value: Any) -> str:
    """Three digits that mean something, never an exponent."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    main()
