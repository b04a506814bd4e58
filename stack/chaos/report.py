"""Telling what a run of chaos found: a table by fault, and one line of JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from schemas.reasons import Lane
from stack.chaos.checker import LaneVerdict
from stack.chaos.evidence import InFlight
from stack.chaos.ordeal import Result


def line(result: Result) -> dict[str, Any]:
    """The last line. Counts are of promotional messages, but for those under ``critical``."""
    findings = result.findings
    calm, urgent = findings.promotional, findings.critical
    return {
        "faults": len(result.faults),
        "messages": calm.messages,
        "lost": calm.lost,
        "duplicates": calm.duplicates,
        "unknown": calm.unknown,
        "unknown_bound": calm.bound,
        "balanced": findings.balanced,
        "unknown_left": calm.unknown_left,
        "failed": calm.failed,
        "slots_at_kills": calm.in_flight.slots,
        "open_at_kills": calm.in_flight.open,
        "claims_at_kills": calm.in_flight.claims,
        "doubtful_at_provider": calm.in_flight.doubtful,
        "critical": {
            "messages": urgent.messages,
            "lost": urgent.lost,
            "duplicates": urgent.duplicates,
            "flagged": urgent.duplicates - urgent.unflagged,
            "unknown": urgent.unknown,
            "bound": urgent.bound,
            "open_at_kills": urgent.in_flight.open,
            "standstill_max_s": _seconds(urgent.standstill_ms),
        },
        "standstill_max_s": _seconds(calm.standstill_ms),
        "seed": result.seed,
        "seconds": round(result.seconds, 1),
    }


def _seconds(milliseconds: int) -> float:
    return round(milliseconds / 1000, 1)


def shown(result: Result) -> RenderableType:
    """The table, and what the records contradict each other in."""
    findings = result.findings
    calm, urgent = findings.promotional, findings.critical
    table = Table(box=None, pad_edge=False, title="promotional / critical", title_justify="left")
    table.add_column("fault")
    for name in ("at", "in flight", "remaining", "slots", "open"):
        table.add_column(name, justify="right")
    for name in ("lost", "twice", "unknown", "bound", "standstill"):
        table.add_column(name, justify="right")
    for struck, one, two in zip(result.faults, calm.by_fault, urgent.by_fault, strict=True):
        left = struck.left_behind.get(Lane.PROMOTIONAL, InFlight())
        left_urgent = struck.left_behind.get(Lane.CRITICAL, InFlight())
        table.add_row(
            struck.fault.name,
            f"{datetime.fromtimestamp(struck.at_ms / 1000, UTC):%H:%M:%S}",
            str(struck.open_before),
            f"{struck.remaining:,}",
            f"{left.slots} / {left_urgent.slots}",
            f"{left.open} / {left_urgent.open}",
            _counts(one.lost, two.lost),
            _counts(one.duplicates, two.duplicates),
            f"{one.unknown} / {two.unknown}",
            f"{left.slots + left.doubtful} / {left_urgent.slots + left_urgent.doubtful}",
            f"{_seconds(one.standstill_ms)} / {_seconds(two.standstill_ms)} s",
        )
    parts: list[RenderableType] = [table, Text(_sums("promotional", calm))]
    parts.append(Text(_sums("critical", urgent)))
    if findings.disagreed:
        parts.append(Text(f"{findings.disagreed} contradictions, of which:", style="red"))
        parts += [Text(f"  {one}", style="red") for one in findings.disagreements]
    if result.broke_off:
        parts.append(Text(f"broken off: {result.broke_off}", style="red"))
    return Group(*parts)


def _counts(promotional: int, critical: int) -> Text:
    return Text(
        f"{promotional} / {critical}", style="red" if promotional else "yellow" if critical else ""
    )


def _sums(name: str, of: LaneVerdict) -> str:
    return (
        f"{name}: {of.messages:,} messages, {of.lost} lost, {of.duplicates} twice "
        f"({of.unflagged} of them not flagged), {of.unknown} unknown of at most {of.bound} "
        f"({of.unknown_left} still are), {of.failed} failed; at kills {of.in_flight.slots} slots "
        f"in use, {of.in_flight.claims} claims, {of.in_flight.open} open at the provider"
    )
