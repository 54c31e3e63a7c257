"""Tables: ratios the right way round, a failed engine's reason, and only the marked parts of the page touched."""

from typing import Any

import pytest

from braid.benchmarks.report import (
    cell,
    comparison,
    engine_table,
    growth,
    load,
    put_between,
    ratios,
    short_table,
    table,
)

MACHINE = {"name": "2 cores", "memory_gib": 24, "python": "3.11", "versions": {"torch": "2.13"}, "date": "today"}


def engine(speed: list[float], first_s: list[float], start_s: float, peak: float, **more: Any) -> dict[str, Any]:
    figures = {"decode_c1": speed, "prefill_c1": speed, "ttft_long_s": first_s}
    told = {"failed": None, "version": "1", "figures": figures, "start_s": [start_s], "peak_mib": peak}
    return told | {"is_ours": False, "others_cores": 0.0} | more


def section(**engines: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "BF16",
        "date": "today",
        "checkpoint": "small-bf16",
        "prompt_tokens": 128,
        "new_tokens": 128,
        "long_tokens": 2048,
        "concurrency": [1],
        "read_gb_s": 30.0,
        "matmul_gflop_s": 400.0,
        "floor": {"decode_c1": 200.0, "ttft_long_s": 1.0},
        "engines": engines,
    }


OURS = engine([100.0, 90.0, 110.0], [2.0], 8.0, 1000.0, is_ours=True)
SPLIT = engine([50.0], [4.0], 16.0, 2000.0, is_ours=True)
FAST, SLOW = engine([80.0], [8.0], 4.0, 4000.0), engine([10.0], [4.0], 2.0, 500.0)


def test_ratios_are_to_the_best_rival_of_each_figure() -> None:
    found = dict(ratios(section(ours=OURS, split=SPLIT, fast=FAST, slow=SLOW)))
    rival = found["ours / best rival"]
    assert rival["decode_c1"] == pytest.approx(100 / 80)
    assert rival["ttft_long_s"] == pytest.approx(2 / 4)  # the smaller is the better one
    assert (rival["start_s"], rival["peak_mib"]) == (4.0, 2.0)
    assert found["split / ours"]["decode_c1"] == pytest.approx(0.5)
    assert found["ours / floor"] == pytest.approx({"decode_c1": 0.5, "ttft_long_s": 2.0})


def test_a_rival_that_is_best_in_another_precision_counts_too() -> None:
    other = section(ours=OURS, fast=engine([160.0], [10.0], 8.0, 5000.0))
    found = dict(ratios(section(ours=OURS, fast=FAST), other))
    assert found["ours / best rival"]["decode_c1"] == pytest.approx(100 / 80)
    assert found["ours / best rival in any precision"]["decode_c1"] == pytest.approx(100 / 160)
    assert found["ours / best rival in any precision"]["ttft_long_s"] == pytest.approx(2 / 8)
    both = comparison({"machine": MACHINE, "sections": {"bf16": section(ours=OURS, fast=FAST), "fp32": other}})
    assert both.count("in any precision") == 1


def test_an_engine_that_failed_says_why_and_has_no_part_in_ratios() -> None:
    lost = {"failed": "out | of memory", "is_ours": False}
    lines = engine_table(section(ours=OURS, fast=lost)).splitlines()
    assert any(line.startswith("| fast | failed: out / of memory |") for line in lines)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "best rival" not in engine_table(section(ours=OURS, fast=lost))


def test_no_engine_at_all_still_makes_a_table() -> None:
    lost = {"failed": "gone", "is_ours": True}
    assert "gone" in comparison({"machine": MACHINE, "sections": {"bf16": section(ours=lost)}})


def test_a_cell_has_median_and_spread_where_there_are_rounds() -> None:
    assert cell([100.0, 90.0, 110.0], str) == "100.0 (90.0..110.0)"
    assert cell([1.0], str) == "1.0"
    assert cell([], str) == ""


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = "before\n<!-- load -->\nold\n<!-- end of load -->\nafter\n"
    assert put_between(page, "load", "new") == "before\n<!-- load -->\nnew\n<!-- end of load -->\nafter\n"
    assert put_between(put_between(page, "load", "x"), "load", "new") == put_between(page, "load", "new")
    with pytest.raises(ValueError, match="lacks"):
        put_between(page, "growth", "new")


def test_curves_and_loads_are_tables_with_their_words() -> None:
    curve = {"title": "Speed", "columns": ["n", "tokens/s"], "rows": [[1, 12.345], [64, 1234.4]], "about": "how"}
    assert "| 64 | 1,234 |" in growth({"machine": MACHINE, "curves": {"a": curve}})
    assert load({"machine": MACHINE, **curve}).endswith("how")


def test_table_is_markdown() -> None:
    assert table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_short_table_has_medians_only_and_says_who_failed() -> None:
    lost = {"failed": "gone", "is_ours": False}
    result = {"machine": MACHINE, "sections": {"bf16": section(ours=OURS, lost=lost)}}
    told = short_table(result)
    assert "| **ours** | 100 | 2.00 | 8.00 | 1,000 |" in told
    assert "| lost | failed |" in told
    assert "| floor of this machine | 200 | 1.00 |" in told
    assert short_table({"machine": MACHINE, "sections": {}}) == "(not measured yet)"
