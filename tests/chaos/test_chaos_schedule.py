"""The schedule: the same seed makes the same, and a full one has what the contract speaks of."""

from __future__ import annotations

from collections import Counter

import pytest

from stack.chaos.schedule import JOB_PARTS, Deed, Part, Trouble, schedule

SEEDS = range(50)


@pytest.mark.parametrize("quick", [False, True])
def test_a_seed_makes_the_same_schedule_and_another_seed_another(quick: bool) -> None:
    assert schedule(7, quick) == schedule(7, quick)
    assert len({schedule(seed, quick) for seed in SEEDS}) == len(SEEDS)


def test_a_full_schedule_has_every_failure_of_the_contract() -> None:
    for seed in SEEDS:
        faults = schedule(seed)
        kills = Counter(one.part for one in faults if one.deed is Deed.KILL)
        assert sum(kills[part] for part in JOB_PARTS) >= 10
        assert all(kills[part] >= 2 for part in JOB_PARTS)
        assert min(kills[Part.JOBMANAGER], kills[Part.KAFKA], kills[Part.REDIS]) >= 3
        assert min(kills[Part.CLICKHOUSE], kills[Part.RECEIVER]) >= 2
        stopped = {one.part: one.lasts_s for one in faults if one.deed is Deed.STOP}
        assert set(stopped) == set(Part) - {Part.CRITICAL, Part.INGEST}
        assert set(stopped.values()) == {60.0}
        assert {one.trouble for one in faults} >= set(Trouble)
        deeds = Counter(one.deed for one in faults)
        assert deeds[Deed.PAUSE] == deeds[Deed.UPGRADE] == deeds[Deed.MACHINE] == 1


def test_pause_and_upgrade_come_in_the_middle() -> None:
    for seed in SEEDS:
        faults = schedule(seed)
        for at, one in enumerate(faults):
            if one.deed in (Deed.PAUSE, Deed.UPGRADE):
                assert len(faults) // 4 < at < len(faults) * 3 // 4


def test_a_quick_schedule_takes_no_minute_of_waiting() -> None:
    for seed in SEEDS:
        faults = schedule(seed, quick=True)
        assert sum(one.lasts_s + one.calm_s for one in faults) < 40
        assert {Deed.KILL, Deed.STOP, Deed.PROVIDER, Deed.PAUSE} == {one.deed for one in faults}
        assert Part.DELIVERY in {one.part for one in faults}
