"""``bench/results.json`` as pictures: ``python -m bench.charts`` writes ``bench/charts/*.svg``.

``make bench`` calls it at its end. A chart is drawn where its section has figures; the same figures
make the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.harness import RESULTS, rounded

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
    axes.bar_label(bars, fmt=partial(rounded, digits=3), padding=3)
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
        rows["decide, two caps, people with state"] = _under(results["decide"], "again_")
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
    """Cost and memory against size; a level line is what a cost should be."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle("Cost and memory against the size of a campaign, and against subtasks")
    panels = figure.subplots(2, 2)
    _lines(
        panels[0][0],
        figures,
        "CPU-seconds a million",
        {
            "decide_cpu_s_per_million_": "decide, all processes",
            "decide_again_cpu_s_per_million_": "decide, people with state",
            "ledger_redis_cpu_s_per_million_": "ledger, Redis",
        },
    )
    _lines(
        panels[0][1],
        figures,
        "CPU microseconds a page, coordinate",
        {"coordinate_us_per_page_": "ordered, put off, ordered again, accepted"},
    )
    _lines(
        panels[1][0],
        figures,
        "megabytes",
        {"decide_taskmanager_rss_mb_": "campaigns job's process"},
    )
    found = {_size(end): value / 2**20 for end, value in _under(figures, "ledger_bytes_").items()}
    panels[1][0].plot(list(found), list(found.values()), marker="o", label="ledger, settled")
    panels[1][0].legend(frameon=False)
    for axes, lowest, highest in ((panels[0][0], 1, 100), (panels[1][0], 0.05, 2_000)):
        axes.set_yscale("log")
        axes.set_ylim(lowest, highest)
    rates = _under(figures, "smtp_per_s_subtasks_")
    costs = _under(figures, "smtp_cpu_s_per_million_subtasks_")
    _bars(
        panels[1][1],
        {f"{count}, {costs[count]:.0f} CPU-s a million": rate for count, rate in rates.items()},
        "messages a second by SMTP, by delivery subtasks",
    )
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _lines(axes: Axes, figures: Figures, unit: str, labels: Mapping[str, str]) -> None:
    """Figures that end in a size, over it."""
    for prefix, label in labels.items():
        found = {_size(end): number for end, number in _under(figures, prefix).items()}
        if found:
            axes.plot(list(found), list(found.values()), marker="o", label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("recipients")
    axes.set_ylabel(unit)
    axes.legend(frameon=False)


def variants(figures: Figures) -> Figure:
    """What choices cost, side by side in one run."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    figure.suptitle("Choices, side by side")
    top, bottom = figure.subplots(2, 1)
    decided = {
        "RocksDB, exactly once": "decide_recipients_per_s",
        "state on the heap, exactly once": "decide_heap_state_recipients_per_s",
        "RocksDB, at least once": "decide_at_least_once_recipients_per_s",
    }
    known = {label: figures[name] for label, name in decided.items() if name in figures}
    _bars(top, known, "recipients decided a second", "RocksDB, exactly")
    rates = {
        f"{name.split('_')[0]} in flight": number
        for name, number in _under(figures, "loop_smtp_").items()
        if name.endswith("_in_flight_per_s")
    }
    _bars(bottom, rates, "messages a second by SMTP, delivery's loop", "320")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def safety(figures: Figures) -> Figure:
    """What safety costs and keeps, as shares of what is allowed."""
    shares = {
        name: figures[figure] / limit
        for name, figure, limit in (
            ("last request after a pause, of 1 s", "pause_last_start_ms", 1_000),
            ("standstill after a kill, of 10 s", "taskmanager_kill_standstill_s", 10),
        )
        if figure in figures
    }
    if "ledger_rate_ratio" in figures:
        shares["rate that the ledger takes, of a tenth"] = (1 - figures["ledger_rate_ratio"]) / 0.1
    figure, axes = _plot("Safety, as a share of what is allowed", len(shares))
    _bars(axes, {name: 100 * share for name, share in shares.items()}, "per cent of the limit")
    axes.axvline(100, color=_COLOURS[3], linewidth=1)
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
        "variants": variants,
        "safety": safety,
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
