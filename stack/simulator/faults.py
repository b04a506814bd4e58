"""Faults and latency, drawn from one seeded generator; and the limit on the rate."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from stack.simulator.config import Faults, Latency, Outage, RateLimit, Rule


class FaultKind(Enum):
    """The ways in which an answer goes wrong."""

    ERROR = "error"
    AMBIGUOUS = "ambiguous"
    HANG_BEFORE = "hang_before"
    HANG_AFTER = "hang_after"
    RESET_BEFORE = "reset_before"
    RESET_AFTER = "reset_after"
    SLOW = "slow"


UNANSWERED = frozenset({FaultKind.AMBIGUOUS, FaultKind.HANG_AFTER, FaultKind.RESET_AFTER})
"""Kinds after which a message is accepted although its sender was not told so."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that strikes one request; ``status`` is what is answered, if anything."""

    kind: FaultKind
    status: int = 0


class FaultPlan:
    """Rates turned into thresholds; :meth:`draw` strikes at most one fault a request."""

    def __init__(self, faults: Faults) -> None:
        rates = [
            *(
                (rate, Fault(FaultKind.ERROR, int(status)))
                for status, rate in faults.error_rates.items()
            ),
            (faults.ambiguous_rate, Fault(FaultKind.AMBIGUOUS, faults.ambiguous_status)),
            (faults.hang_before_rate, Fault(FaultKind.HANG_BEFORE)),
            (faults.hang_after_rate, Fault(FaultKind.HANG_AFTER)),
            (faults.reset_before_rate, Fault(FaultKind.RESET_BEFORE)),
            (faults.reset_after_rate, Fault(FaultKind.RESET_AFTER)),
            (faults.slow_rate, Fault(FaultKind.SLOW)),
        ]
        self._steps: list[tuple[float, Fault]] = []
        total = 0.0
        for rate, fault in rates:
            if rate > 0.0:
                total += rate
                self._steps.append((total, fault))

    def draw(self, rng: random.Random) -> Fault | None:
        """The fault of one request, if any. Draws nothing when no rate is set."""
        if not self._steps:
            return None
        value = rng.random()
        for limit, fault in self._steps:
            if value < limit:
                return fault
        return None


def latency_draw(latency: Latency) -> Callable[[random.Random], float] | None:
    """A function that draws seconds, or None for no latency."""
    match latency.kind:
        case "none":
            return None
        case "fixed":
            seconds = latency.ms / 1000.0
            return lambda rng: seconds
        case "uniform":
            low, high = latency.min_ms / 1000.0, latency.max_ms / 1000.0
            return lambda rng: rng.uniform(low, high)
        case "lognormal":
            mu, sigma = math.log(latency.median_ms / 1000.0), latency.sigma
            return lambda rng: rng.lognormvariate(mu, sigma)


def outage_now(outage: Outage, now_ms: int) -> bool:
    """Whether the provider is out of service."""
    if outage.active:
        return True
    if outage.from_ms is None and outage.until_ms is None:
        return False
    begun = outage.from_ms is None or now_ms >= outage.from_ms
    return begun and (outage.until_ms is None or now_ms < outage.until_ms)


class Rules:
    """Rules by address, compiled."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = [(re.compile(rule.pattern), rule) for rule in rules]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def match(self, address: str) -> Rule | None:
        """The first rule whose pattern is found in the address."""
        for pattern, rule in self._rules:
            if pattern.search(address):
                return rule
        return None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may still do in its tightest window; ``reset_s`` is the epoch it ends."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: int


class RateLimiter:
    """Counts per key in calendar seconds and minutes. A refused request uses nothing up."""

    def __init__(self) -> None:
        self._windows: dict[str, list[int]] = {}

    def reset(self) -> None:
        """Start all windows afresh."""
        self._windows.clear()

    def take(self, limit: RateLimit, key: str, now_ms: int) -> Allowance | None:
        """Take one; None when no limit is configured."""
        per_second, per_minute = limit.per_second, limit.per_minute
        if per_second is None and per_minute is None:
            return None
        second, minute = now_ms // 1000, now_ms // 60_000
        window = self._windows.setdefault(key, [second, 0, minute, 0])
        if window[0] != second:
            window[0], window[1] = second, 0
        if window[2] != minute:
            window[2], window[3] = minute, 0
        if per_minute is not None and window[3] >= per_minute:
            return Allowance(False, per_minute, 0, (minute + 1) * 60)
        if per_second is not None and window[1] >= per_second:
            return Allowance(False, per_second, 0, second + 1)
        window[1] += 1
        window[3] += 1
        left_minute = None if per_minute is None else per_minute - window[3]
        if per_second is not None:
            left_second = per_second - window[1]
            if left_minute is None or left_second <= left_minute:
                return Allowance(True, per_second, left_second, second + 1)
        return Allowance(True, per_minute or 0, left_minute or 0, (minute + 1) * 60)
