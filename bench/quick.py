"""What has become dearer: ``make bench-quick``, two minutes.

Measures what can be measured without a stack and compares it with ``bench/results.json``. Machines
differ and are shared, so costs are not compared but ratios: each cost divided by that of plain
Jinja2 for the same message, measured in the same run. Exits with 1 where something became dearer
by more than ``--tolerance``; a figure that is said to have moved should be measured once more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import clients, decide, delivery, rendering
from bench.harness import RESULTS

YARDSTICK = ("rendering", "render, plain Jinja2")
PEOPLE = 20_000
RUNS: Mapping[str, Callable[[], Mapping[str, float]]] = {
    "rendering": rendering.run,
    "clients": clients.run,
    "rules": decide.run,
    "loop": lambda: delivery.run(PEOPLE),
}


def cost(section: str, figure: str, number: float) -> float | None:
    """A figure as processor time, in any unit; None for one that is no cost."""
    if section == "rules":
        return 1e6 / number
    return number if section == "rendering" or figure.endswith("cpu_us") else None


def ratios(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each cost as a multiple of the yardstick's, by ``section: figure``."""
    yard = results[YARDSTICK[0]][YARDSTICK[1]]
    return {
        f"{section}: {figure}": spent / yard
        for section in RUNS
        for figure, number in results.get(section, {}).items()
        if (section, figure) != YARDSTICK and (spent := cost(section, figure, number)) is not None
    }


def moved(
    before: Mapping[str, float], now: Mapping[str, float], tolerance: float
) -> dict[str, float]:
    """By how much ratios differ, as a share of what they were, where that is beyond tolerance."""
    changes = {name: now[name] / before[name] - 1 for name in before if name in now}
    return {name: change for name, change in changes.items() if abs(change) > tolerance}


def main() -> int:
    """Measure, compare, say what moved."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quick",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tolerance", type=float, default=0.25, help="[default: 0.25, a quarter]")
    parser.add_argument("--json", action="store_true", help="print one JSON line and no table")
    options = parser.parse_args()
    if not RESULTS.exists():
        parser.error(f"{RESULTS} is missing: run `make bench` first")
    before = ratios(json.loads(RESULTS.read_text()))
    console = Console(stderr=True)
    found: dict[str, Mapping[str, float]] = {
        name: run() for name, run in track(RUNS.items(), "measuring", console=console)
    }
    now = ratios(found)
    changes = moved(before, now, options.tolerance)
    told: dict[str, Any] = {
        "compared": len(before.keys() & now.keys()),
        "moved": {name: round(change, 3) for name, change in changes.items()},
        "not_measured_before": sorted(now.keys() - before.keys()),
    }
    if not options.json:
        table = Table(box=None)
        for column in ("cost as a multiple of plain Jinja2's", "was", "is", "moved by"):
            table.add_column(column, justify="left" if column.startswith("cost") else "right")
        for name, change in sorted(changes.items(), key=lambda one: -one[1]):
            colour = "red" if change > 0 else "green"
            table.add_row(
                name, f"{before[name]:.3g}", f"{now[name]:.3g}", f"[{colour}]{change:+.0%}[/]"
            )
        console.print(table if changes else "Nothing has moved.")
    print(json.dumps(told), flush=True)
    return int(any(change > 0 for change in changes.values()))


if __name__ == "__main__":
    sys.exit(main())
