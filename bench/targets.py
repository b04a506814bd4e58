"""What figures are to reach on two cores with everything on the machine.

``python -m bench.targets`` writes what was measured beside it into ``bench/README.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.harness import RESULTS, rounded


@dataclass(frozen=True, slots=True)
class Target:
    """A limit, and on which side of it a figure should be."""

    limit: float
    at_least: bool = True

    def met(self, number: float) -> bool:
        """Whether a figure is on the right side."""
        return number >= self.limit if self.at_least else number <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:,.10g}"


def _at_most(limit: float) -> Target:
    return Target(limit, at_least=False)


TARGETS: Mapping[str, Target] = {
    "decide.recipients_per_s": Target(60_000),
    "deliver.smtp_per_s": Target(10_000),
    "deliver.smtp_cpu_s_per_million": _at_most(130),
    "deliver.http_per_s": Target(8_000),
    "deliver.http_cpu_s_per_million": _at_most(160),
    "e2e.recipients_per_s": Target(6_000),
    "ledger.bytes_per_10m": _at_most(3_000_000),
    "audience.profiles_per_s": Target(60_000),
    "audience.parquet_profiles_per_s": Target(150_000),
    "audience.peak_rss_mb": _at_most(1_024),
    "stack.idle_cpu_pct": _at_most(10),
    "stack.rss_mb": _at_most(6_000),
    "safety.pause_last_start_ms": _at_most(1_000),
    "safety.taskmanager_kill_standstill_s": _at_most(10),
    "safety.checkpoints_complete_share": Target(0.99),
    "safety.failovers": _at_most(0),
    "safety.ledger_rate_ratio": Target(0.9),
}
"""By ``section.figure``. Targets are of these sizes: ``e2e`` 500,000 recipients, ``audience`` two
million, ``safety`` ten minutes of load."""

PAGE = RESULTS.with_name("README.md")
BEGIN = "<!-- targets: python -m bench.targets -->\n"
END = "<!-- end of targets -->\n"


def table(results: Mapping[str, Any]) -> str:
    """The targets with what ``bench/results.json`` says of them, as Markdown."""
    lines = [
        "| figure | measured | spread | wanted | met | commit |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, target in TARGETS.items():
        section, figure = name.split(".")
        number = results.get(section, {}).get(figure)
        if number is None:
            lines.append(f"| `{name}` | not measured | | {target} | | |")
            continue
        about = results["about"][section]
        spread = about["spread"].get(figure)
        spans = "" if spread is None else f"{spread:.0%} of {about['runs']}"
        met = "yes" if target.met(number) else "**no**"
        lines.append(
            f"| `{name}` | {rounded(number)} | {spans} | {target} | {met} | {about['fanfare']} |"
        )
    return "\n".join(lines) + "\n"


def with_table(page: str, results: Mapping[str, Any]) -> str:
    """A page with the table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table(results)}{END}{after}"


def main() -> int:
    """Write the table."""
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
