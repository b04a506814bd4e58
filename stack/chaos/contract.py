"""The crash contract: what each kind of failure cost, measured, as a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from schemas.errors import InvalidInput
from stack.chaos.checker import Cost
from stack.chaos.ordeal import Result
from stack.layout import replace_file

BEGIN = "<!-- crash contract: fanfare chaos --contract README.md -->\n"
END = "<!-- end of crash contract -->\n"


def table(result: Result) -> str:
    """One line a kind of failure; sums, and of delays the longest."""
    kinds: dict[str, list[tuple[Cost, Cost]]] = {}
    costs = zip(
        result.faults,
        result.findings.promotional.by_fault,
        result.findings.critical.by_fault,
        strict=True,
    )
    for struck, calm, urgent in costs:
        kinds.setdefault(struck.fault.name, []).append((calm, urgent))
    lines = [
        "| failure | times | promotional: lost | twice | unknown | delayed by | "
        "critical: lost | twice, flagged | unknown | delayed by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in sorted(kinds.items()):
        cells = [*_cells(one for one, _ in found), *_cells(two for _, two in found)]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(costs: Iterable[Cost]) -> list[str]:
    found = list(costs)
    return [
        str(sum(one.lost for one in found)),
        str(sum(one.duplicates for one in found)),
        str(sum(one.unknown for one in found)),
        f"{max(one.standstill_ms for one in found) / 1000:.1f} s",
    ]


def section(result: Result) -> str:
    """The table and what it was measured on."""
    calm, urgent = result.findings.promotional, result.findings.critical
    return (
        f"{table(result)}\n"
        f"Measured by `make chaos SEED={result.seed}`: {len(result.faults)} faults during "
        f"{calm.messages:,} promotional and {urgent.messages:,} critical messages. "
        f"{calm.unknown:,} promotional messages were unknown for a while, where at most "
        f"{calm.bound:,} may be (the requests in flight at kills, and those that the provider "
        f"hung, reset or answered ambiguously); webhooks settled all but {calm.unknown_left:,}. "
        f"Of the critical messages {urgent.duplicates:,} left twice, each said to be in its "
        f"outcome, where at most {urgent.bound:,} may.\n"
    )


def rewrite(path: Path, result: Result) -> None:
    """Put the section between the marks of a file.

    Raises:
        InvalidInput: there is no such file, or it has no such marks.
    """
    before, after = around(path)
    replace_file(path, before + BEGIN + section(result) + END + after)


def around(path: Path) -> tuple[str, str]:
    """What a file has before the section and after it. Raises ``InvalidInput`` like `rewrite`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path} can't be read: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidInput(f"{path} has no place for the table: put {BEGIN!r} and {END!r} into it")
    return before, after
