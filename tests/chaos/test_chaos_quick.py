"""The quick schedule on the running stack: everything breaks, nothing is lost."""

from __future__ import annotations

from stack.chaos.contract import section
from stack.chaos.ordeal import undergo
from stack.chaos.report import line
from tests.stack_fixture import RunningJobs

SEED = 4


def test_a_quick_schedule_loses_nothing_and_sends_nothing_twice(running_jobs: RunningJobs) -> None:
    running_jobs.ensure()
    result = undergo(running_jobs.home, SEED, quick=True, tell=print)
    found = line(result)
    assert not result.broke_off, result.broke_off
    assert result.findings.disagreements == ()
    assert (found["faults"], found["lost"], found["duplicates"]) == (result.planned, 0, 0)
    assert found["balanced"]
    # Something was under way when it was killed, or the run has shown nothing.
    assert found["slots_at_kills"] > 0
    assert found["open_at_kills"] > 0
    assert 0 < found["unknown"] <= found["unknown_bound"]
    critical = found["critical"]
    assert critical["lost"] == 0
    assert critical["duplicates"] == critical["flagged"] <= critical["bound"]
    assert result.sound
    assert f"make chaos SEED={SEED}" in section(result)
