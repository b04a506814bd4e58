"""Thousands of seeded histories of crashes, late predecessors and lost answers keep the promises.

``FANFARE_SIM_SEED`` is the first seed, ``FANFARE_SIM_HISTORIES`` how many there are. What fails is
told step by step, in a history of which no event can be left out.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.simulation.bugs import planted
from tests.simulation.history import history_of, play
from tests.simulation.minimise import minimised, told
from tests.simulation.world import small_pages

FIRST = int(os.environ.get("FANFARE_SIM_SEED", "0"))
HISTORIES = int(os.environ.get("FANFARE_SIM_HISTORIES", "10000"))
_ENOUGH = 2_000
"""From so many histories on, every kind of fault must have happened."""
FAULTS = (
    "delivery job killed",
    "predecessor acts on",
    "predecessor fenced",
    "campaigns job killed",
    "transaction lost",
    "transaction timed out before its checkpoint",
    "transaction timed out after its checkpoint",
    "answer of the ledger lost",
    "call to the ledger delayed",
    "ledger refused",
    "redis restarted empty",
    "redis rolled back",
    "redis unreachable",
    "redis half done",
    "redis answer lost",
    "provider: accept, answer lost",
    "provider: vanish",
    "provider: late",
    "provider: refuse",
    "provider: address dead",
    "provider: throttle",
    "provider: error",
    "provider: account refused",
    "dead letter replayed",
    "unknown settled by hand",
    "outcomes: record repeated",
    "commands: record repeated",
)


@pytest.fixture(autouse=True)
def pages() -> Iterator[None]:
    with small_pages():
        yield


def test_histories_keep_the_promises(capsys: pytest.CaptureFixture[str]) -> None:
    faults: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    steps = requests = unknown = 0
    begun = time.process_time()
    for seed in range(FIRST, FIRST + HISTORIES):
        history = history_of(seed)
        simulation, broken = play(history)
        if broken is not None:
            pytest.fail(told(minimised(history)), pytrace=False)
        steps += simulation.world.steps
        requests += len(simulation.world.truth.requests)
        unknown += simulation.unknown
        faults.update(simulation.world.faults)
        ends.update(
            memory.run.status.value
            for memory in simulation.campaigns.memories.values()
            if memory.run is not None
        )
    with capsys.disabled():
        print(
            f"\n{HISTORIES:,} histories from seed {FIRST}, {steps:,} steps, {requests:,} requests, "
            f"{unknown:,} unknown, in {time.process_time() - begun:.1f} s; runs: "
            + ", ".join(f"{name} {count:,}" for name, count in ends.most_common())
            + "\nfaults: "
            + ", ".join(f"{name} {count:,}" for name, count in faults.most_common())
        )
    if HISTORIES >= _ENOUGH:
        assert [kind for kind in FAULTS if not faults[kind]] == []
        assert {"completed", "cancelled", "expired"} <= set(ends)
        assert requests > HISTORIES
        assert unknown > HISTORIES / 100


def test_a_seed_is_one_history() -> None:
    for seed in (3, 22, 104):
        first, again = (play(history_of(seed), trace=True)[0].world for _ in range(2))
        assert len(first.lines) > 20
        assert first.lines == again.lines


def test_what_fails_is_told_without_what_does_not_matter() -> None:
    with planted("timeout_as_refusal"):
        seed = next(seed for seed in range(100) if play(history_of(seed))[1] is not None)
        small = minimised(history_of(seed))
        assert len(small.events) < len(history_of(seed).events) / 2
        for at in range(len(small.events)):
            without = small.events[:at] + small.events[at + 1 :]
            assert play(replace(small, events=without))[1] is None
        story = told(small)
    assert f"seed {seed}" in story
    assert "BROKEN: the provider took" in story
    assert play(small)[1] is None
