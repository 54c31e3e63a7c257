"""Draws the pictures of docs/performance.md as SVG, the same file from the same figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from braid.benchmarks.figures import summary

Result = Mapping[str, Any]
OURS, RIVALS, FLOOR = ("#b5451b", "#e8a33d"), ("#33658a", "#6aa0c4", "#a9c4d8", "#c9d6df"), "#222222"
plt.rcParams.update({"svg.hashsalt": "braid", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def compare(result: Result, path: Path) -> None:
    """A row a section: decode speed by concurrency, then time to first token. Bars are medians, whiskers all rounds."""
    sections = list(result["sections"].values())
    height = 2.6 * len(sections) + 0.6
    figure, axes = plt.subplots(len(sections), 2, figsize=(10, height), width_ratios=(2.6, 1), squeeze=False)
    for (speed, first), section in zip(axes, sections, strict=True):
        engines = {name: engine for name, engine in section["engines"].items() if not engine["failed"]}
        colours = _colours(section["engines"])  # of those that failed too: a name keeps its colour
        keys = [f"decode_c{c}" for c in section["concurrency"]]
        _bars(speed, engines, keys, colours, section["floor"])
        speed.set_xticks(range(len(keys)), [f"c = {c}" for c in section["concurrency"]])
        speed.set_title(f"{section['title']}: decode, tokens/s (more is better)", loc="left", fontsize=10)
        _bars(first, engines, ["ttft_long_s"], colours, section["floor"])
        first.set_xticks([])
        first.set_title(f"first token of {section['long_tokens']:,}, s (less is better)", loc="left", fontsize=10)
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.5 / height, 1, 1))
    _save(path)


def growth(result: Result, path: Path) -> None:
    """A panel a curve: the figure named last in its columns over the first."""
    curves = list(result["curves"].values())
    figure, axes = plt.subplots(-(-len(curves) // 2), 2, figsize=(10, 2.8 * -(-len(curves) // 2)), squeeze=False)
    for axis, curve in zip(axes.flat, curves, strict=False):
        x, y = curve["columns"].index(curve["x"]), curve["columns"].index(curve["y"])
        groups: dict[str, list[tuple[float, float]]] = {}
        for row in curve["rows"]:
            label = ", ".join(f"{name} = {row[curve['columns'].index(name)]}" for name in curve.get("by", []))
            groups.setdefault(label, []).append((row[x], row[y]))
        for label, points in groups.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label or None)
        axis.set_xscale("log", base=2)
        ticks = sorted({row[x] for row in curve["rows"]})
        axis.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(curve["title"], loc="left", fontsize=10)
        axis.set_xlabel(curve["x"])
        axis.set_ylabel(curve["y"])
        if any(groups):
            axis.legend(frameon=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    figure.tight_layout()
    _save(path)


DRAWN: Mapping[str, Callable[[Result, Path], None]] = {"compare": compare, "growth": growth}


def _bars(axis: Axes, engines: Result, keys: list[str], colours: Mapping[str, str], floor: Mapping[str, float]) -> None:
    width = 0.8 / max(len(engines), 1)
    for place, (name, engine) in enumerate(engines.items()):
        for group, key in enumerate(keys):
            if key not in engine["figures"]:
                continue
            told, x = summary(engine["figures"][key]), group - 0.4 + width * (place + 0.5)
            axis.bar(x, told.median, 0.92 * width, color=colours[name], label=name if group == 0 else None)
            axis.vlines(x, told.least, told.most, color="#00000080", linewidth=1)
            axis.annotate(f"{told.median:.3g}", (x, told.most), (0, 2), textcoords="offset points", ha="center", size=7)
    for group, key in enumerate(keys):
        if key in floor:
            label = "what the machine allows" if group == 0 else ""
            axis.hlines(floor[key], group - 0.42, group + 0.42, color=FLOOR, linestyle=(0, (3, 2)), label=label)


def _colours(engines: Result) -> dict[str, str]:
    ours = [name for name, engine in engines.items() if engine["is_ours"]]
    rivals = [name for name in engines if name not in ours]
    return dict(zip(ours, OURS, strict=False)) | dict(zip(rivals, RIVALS, strict=False))


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Every name once, whichever panel it is in."""
    named: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    return list(named.values()), list(named)


def _save(path: Path) -> None:
    plt.savefig(path, format="svg", metadata={"Date": None})
    plt.close()
