"""What figures are to reach on two cores with everything on the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
