"""`make bench`: what every part costs: tables, `bench/results.json`, charts, the page's targets."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.charts import draw
from bench.harness import RESULTS, machine, rounded
from bench.targets import PAGE, TARGETS, Target, with_table


@dataclass(frozen=True, slots=True)
class Section:
    """A section's module has ``run() -> {figure: number}``; ``runs``: how often it is measured."""

    module: str
    about: str
    runs: int = 3

    def measure(self) -> Mapping[str, float]:
        """One measurement."""
        run: Callable[[], Mapping[str, float]] = importlib.import_module(self.module).run
        return run()


SECTIONS: Mapping[str, Section] = {
    "rendering": Section("bench.rendering", "what a message costs before it is sent"),
    "clients": Section("bench.clients", "a request and a message, beside the libraries"),
    "rules": Section("bench.decide", "decisions and outcomes in Python alone"),
    "loop": Section("bench.delivery", "delivery's loop without Flink and Kafka"),
    "audience": Section("bench.audience", "snapshots from CSV and Parquet, and their memory"),
    "ledger": Section("bench.ledger", "Redis's memory and time for the ledger", 1),
    "decide": Section("bench.engine_decide", "the campaigns job under Flink"),
    "deliver": Section("bench.engine_deliver", "the delivery job under Flink"),
    "e2e": Section("bench.end_to_end", "launch to last outcome, everything on"),
    "variants": Section("bench.variants", "what choices cost, side by side", 1),
    "safety": Section("bench.safety", "pause, standstill, checkpoints, what the ledger costs", 1),
    "scaling": Section("bench.scaling", "cost against size and against subtasks", 1),
    "stack": Section("bench.idle", "everything up and nothing to do", 1),
}


def summary(found: list[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median and spread (highest less lowest, as a share of the median) of each figure."""
    told: dict[str, dict[str, float]] = {}
    for name in found[0]:
        values = [one[name] for one in found if name in one]
        middle = statistics.median(values)
        spread = (max(values) - min(values)) / abs(middle) if middle else 0.0
        told[name] = {"median": middle, "spread": spread, "runs": len(values)}
    return told


def _wanted(target: Target | None, number: float) -> str:
    if target is None:
        return ""
    return f"[{'green' if target.met(number) else 'red'}]{target}[/]"


def _shown(section: str, told: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=f"{section}: {SECTIONS[section].about}", title_justify="left", box=None)
    table.add_column("figure")
    table.add_column("median", justify="right")
    table.add_column("spread", justify="right")
    table.add_column("wanted", justify="right")
    for name, one in told.items():
        spread = f"{one['spread']:.0%} of {one['runs']:.0f}" if one["runs"] > 1 else ""
        table.add_row(
            name,
            rounded(one["median"]),
            spread,
            _wanted(TARGETS.get(f"{section}.{name}"), one["median"]),
        )
    return table


def _keep(section: str, told: Mapping[str, Mapping[str, float]], where: Mapping[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[section] = {name: round(one["median"], 4) for name, one in told.items()}
    about = results.setdefault("about", {})
    about[section] = {
        "at": f"{datetime.now(UTC):%Y-%m-%d}",
        **where,
        "runs": max(int(one["runs"]) for one in told.values()),
        "spread": {name: round(one["spread"], 3) for name, one in told.items() if one["runs"] > 1},
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """Measure the chosen sections."""
    names = "\n".join(f"  {name:10} {one.about}" for name, one in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measure what every part costs.\n\nsections:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("section", nargs="*", metavar="SECTION", help="[default: all]")
    parser.add_argument("--runs", type=int, help="measure so often [default: by section]")
    parser.add_argument("--json", action="store_true", help="print one JSON line and no table")
    parser.add_argument("--no-keep", action="store_true", help="leave bench/results.json alone")
    options = parser.parse_args()
    wrong = [name for name in options.section if name not in SECTIONS]
    if wrong:
        parser.error(f"no section {', '.join(wrong)}: expected {', '.join(SECTIONS)}")
    console = Console(stderr=options.json)
    figures: dict[str, dict[str, float]] = {}
    broken: list[str] = []
    for name in options.section or SECTIONS:
        section, where = SECTIONS[name], machine()
        began = time.monotonic()
        runs = options.runs or section.runs
        console.print(f"[dim]{name}: {section.about}, measured {runs} times[/]")
        try:
            told = summary([section.measure() for _ in range(runs)])
        except Exception as error:
            broken.append(name)
            console.print(f"[red]{name} could not be measured: {error!r}[/]\n")
            continue
        console.print(_shown(name, told))
        console.print(
            f"[dim]{time.monotonic() - began:.0f} s, load before {where['load_before']}[/]\n"
        )
        figures[name] = {figure: one["median"] for figure, one in told.items()}
        if not options.no_keep:
            _keep(name, told, where)
    if not options.no_keep:
        results = json.loads(RESULTS.read_text())
        draw(results)
        PAGE.write_text(with_table(PAGE.read_text(), results))
    print(json.dumps(figures), flush=True)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
