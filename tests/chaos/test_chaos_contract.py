"""The table of the crash contract, and its place in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import InvalidInput
from stack.chaos import ordeal
from stack.chaos.checker import check
from stack.chaos.contract import BEGIN, END, rewrite, section, table
from stack.chaos.ordeal import Result
from stack.chaos.report import line
from tests.chaos.test_chaos_checker import FAULTS, accepted, owed, sound


def result(second_coming: bool = False) -> Result:
    evidence = sound()
    if second_coming:
        evidence = replace(evidence, provider=(*evidence.provider, accepted(owed(3), 12_500)))
    return Result(11, len(FAULTS), FAULTS, check(evidence, FAULTS), 60.0)


def test_faults_of_one_kind_are_one_line() -> None:
    rows = table(result(second_coming=True)).splitlines()
    assert rows[2:] == [
        "| TaskManager of delivery killed | 2 | 0 | 1 | 0 | 1.0 s | 0 | 0 | 0 | 1.0 s |"
    ]


def test_the_section_stands_between_the_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}old\n{END}after\n")
    rewrite(path, result())
    text = path.read_text()
    assert text == f"before\n{BEGIN}{section(result())}{END}after\n"
    rewrite(path, result())
    assert path.read_text() == text
    path.write_text("no marks")
    with pytest.raises(InvalidInput, match="no place for the table"):
        rewrite(path, result())


def test_the_line_says_what_the_verdict_is() -> None:
    found = line(result())
    assert list(found)[:7] == [
        "faults", "messages", "lost", "duplicates", "unknown", "unknown_bound", "balanced"
    ]  # fmt: skip
    assert (found["faults"], found["unknown_bound"], found["seed"]) == (2, 3, 11)
    assert result().sound
    assert not result(second_coming=True).sound


def test_a_schedule_that_was_broken_off_is_not_sound() -> None:
    assert not replace(result(), broke_off="Kafka broker killed: sends do not flow").sound
    assert not replace(result(), planned=3).sound


class Draining:
    """A provider whose webhooks are taken slowly, and then no more."""

    def __init__(self, taken: list[int], ends: bool) -> None:
        self.taken, self.ends, self.waits = taken, ends, 0

    def drain_webhooks(self, seconds: int) -> bool:
        self.waits += 1
        return self.ends and self.waits > len(self.taken)

    def ask(self, path: str) -> dict[str, int]:
        assert path == "/webhooks"
        return {"acked_events": self.taken[min(self.waits, len(self.taken)) - 1]}


@pytest.mark.parametrize(
    ("taken", "ends", "waits"), [([], True, 1), ([0, 5, 9], True, 4), ([0, 5, 5, 9], False, 3)]
)
def test_webhooks_are_waited_for_as_long_as_any_are_taken(
    taken: list[int], ends: bool, waits: int
) -> None:
    control: Any = Draining(taken, ends)
    assert ordeal._drain_webhooks(control) is ends
    assert control.waits == waits
