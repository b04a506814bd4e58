"""A simulation that finds nothing proves nothing: it must find each of these bugs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.bugs import BUGS, planted
from tests.simulation.history import history_of, play
from tests.simulation.world import small_pages

WITHIN = 3_000


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, record_property: Callable[[str, object], None]) -> None:
    with small_pages(), planted(name):
        for seed in range(WITHIN):
            broken = play(history_of(seed))[1]
            if broken is not None:
                record_property("found", f"seed {seed}: {broken}")
                print(f"{name}: seed {seed}: {broken}")
                return
    pytest.fail(f"{WITHIN} histories did not find it: {BUGS[name].__doc__}")
