"""From a failing history to one that fails with as few events as possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.simulation.history import History, play


def minimised(history: History) -> History:
    """A smaller history that still breaks a promise: no event of it can be left out."""

    def fails(one: History) -> bool:
        return play(one)[1] is not None

    return _simpler(_shorter(history, fails), fails)


def _shorter(history: History, fails: Callable[[History], bool]) -> History:
    size = max(1, len(history.events) // 2)
    while True:
        at = 0
        removed = False
        while at < len(history.events):
            events = history.events[:at] + history.events[at + size :]
            candidate = replace(history, events=events)
            if fails(candidate):
                history, removed = candidate, True
            else:
                at += size
        if size == 1 and not removed:
            return history
        size = max(1, size // 2)


def _simpler(history: History, fails: Callable[[History], bool]) -> History:
    """Fewer runs, and the smallest numbers."""
    setup = history.setup
    for number in reversed(range(len(setup.specs))):
        specs = setup.specs[:number] + setup.specs[number + 1 :]
        candidate = replace(history, setup=replace(setup, specs=specs))
        if specs and fails(candidate):
            history, setup = candidate, candidate.setup
    for at, (kind, number) in enumerate(history.events):
        if number == 0:
            continue
        events = (*history.events[:at], (kind, 0), *history.events[at + 1 :])
        candidate = replace(history, events=events)
        if fails(candidate):
            history = candidate
    return history


def told(history: History) -> str:
    """A history step by step, for people."""
    simulation, broken = play(history, trace=True)
    setup = history.setup
    lines = [
        f"seed {setup.seed}: {len(history.events)} events, {setup.counts} recipients by shard, "
        f"window {setup.policy.window}, silence {setup.policy.silence}",
    ]
    for spec in setup.specs:
        cap = spec.caps[0]
        lines.append(
            f"  {spec.run}: legs {', '.join(leg.leg for leg in spec.legs)}; at most {cap.limit} in "
            f"{cap.window.value} {cap.length}, then {cap.when_capped.value}; quiet hours "
            f"{spec.quiet_hours}; valid for {spec.valid_for}; until {spec.deadline:%d %H:%M}"
        )
    return "\n".join((*lines, *simulation.world.lines, f"BROKEN: {broken}"))
