"""``bench/results.json`` as pictures: ``python -m bench.charts`` writes ``bench/charts/*.svg``.

``make bench`` calls it at its end. A chart is drawn where its section has figures; the same figures
make the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.harness import RESULTS

FOLDER = RESULTS.with_name("charts")
PROCESSES = (
    "taskmanager",
    "jobmanager",
    "kafka",
    "redis",
    "clickhouse",
    "zookeeper",
    "receiver",
    "supervisor",
)
"""Whose time is ours to pay; the provider simulator's is not."""
_COLOURS = ("#1f4e79", "#5b9bd5", "#ed7d31", "#c00000", "#70ad47", "#7f7f7f", "#bfbfbf", "#000000")
_OURS, _THEIRS = "#1f4e79", "#bfbfbf"

Figures = Mapping[str, float]


def _bars(axes: Axes, values: Mapping[str, float], unit: str, highlight: str = "") -> None:
    names = list(values)[::-1]
    colours = [_OURS if not highlight or highlight in name else _THEIRS for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel(unit)


def _stacked(axes: Axes, rows: Mapping[str, Figures]) -> None:
    """Processor seconds a million messages by process, a bar a row."""
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for process, colour in zip(PROCESSES, _COLOURS, strict=True):
        widths = [rows[name].get(f"{process}_cpu_s_per_million", 0.0) for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=process)
        left = [one + more for one, more in zip(left, widths, strict=True)]
    for at, total in enumerate(left):
        axes.text(total, at, f" {total:.0f}", va="center")
    axes.margins(x=0.12)
    axes.set_xlabel("CPU-seconds a million messages")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.3))


def _under(figures: Figures, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): number
        for name, number in figures.items()
        if name.startswith(prefix)
    }


def rendering(figures: Figures) -> Figure:
    """What a message costs before it is sent."""
    figure, axes = _plot("A message of 3 KB, 10 variables, 3 links", len(figures))
    axes.set_xscale("log")
    _bars(axes, figures, "CPU microseconds a message (logarithmic)")
    return figure


def clients(figures: Figures) -> Figure:
    """Our clients beside libraries."""
    costs = {
        name.removesuffix(".cpu_us").replace(".", ": "): number
        for name, number in figures.items()
        if name.endswith(".cpu_us")
    }
    figure, axes = _plot("A request over 50 connections, beside libraries", len(costs))
    _bars(axes, costs, "CPU microseconds a request", "ours")
    return figure


def cost(results: Mapping[str, Figures]) -> Figure:
    """Where processor time goes, by process."""
    rows: dict[str, Figures] = {}
    if "decide" in results:
        rows["decide, two caps"] = results["decide"]
        rows["decide, no caps"] = _under(results["decide"], "no_caps_")
    if "deliver" in results:
        rows["deliver, SMTP"] = _under(results["deliver"], "smtp_")
        rows["deliver, HTTP"] = _under(results["deliver"], "http_")
    if "e2e" in results:
        rows["end to end, SMTP"] = results["e2e"]
    figure, axes = _plot("What a million messages cost", len(rows) + 1)
    _stacked(axes, rows)
    return figure


def scaling(figures: Figures) -> Figure:
    """Cost against size; a level line is what it should be."""
    figure, axes = _plot("Cost against the size of a campaign", 8)
    for prefix, label in (
        ("decide_cpu_s_per_million_", "decide, all processes"),
        ("ledger_redis_cpu_s_per_million_", "ledger, Redis"),
    ):
        found = {_size(end): number for end, number in _under(figures, prefix).items()}
        axes.plot(list(found), list(found.values()), marker="o", label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("recipients of the campaign")
    axes.set_ylabel("CPU-seconds a million")
    axes.legend(frameon=False)
    return figure


def _size(end: str) -> int:
    return int(end[:-1]) * {"k": 1_000, "m": 1_000_000}[end[-1]]


def _plot(title: str, rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 1.2 + 0.36 * rows), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure, axes


def draw(results: Mapping[str, Figures], folder: Path = FOLDER) -> Sequence[Path]:
    """Draw what there are figures of; the files written."""
    of_section: Mapping[str, Callable[[Figures], Figure]] = {
        "rendering": rendering,
        "clients": clients,
        "scaling": scaling,
    }
    figures = {name: make(results[name]) for name, make in of_section.items() if name in results}
    if results.keys() & {"decide", "deliver", "e2e"}:
        figures["cost"] = cost(results)
    folder.mkdir(exist_ok=True)
    written = []
    with mpl.rc_context({"svg.hashsalt": "fanfare", "font.size": 10}):
        for name, figure in figures.items():
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            written.append(path)
    return written


def main() -> int:
    """Draw the committed figures."""
    for path in draw(json.loads(RESULTS.read_text())):
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
