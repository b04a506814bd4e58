"""How fast requests may leave: token buckets, a rate that yields, a circuit breaker.

Pure arithmetic on microseconds, and ``ShapingModel``, the reference of ``sinks.shaping``, whose
scripts do the same on Redis's clock and are compared with it step by step.

What a limit guarantees
=======================
*L requests per period P* is kept by a bucket of ``burst`` tokens, refilled at ``refill``::

    burst  = max(1, L x slice / P)           slice: 50 ms of a second, 1 s of a minute
    refill = (L + 1 - burst) / (P + JITTER)

Within any half-open interval of ``P + JITTER`` less than ``burst + refill x (P + JITTER)``
= L + 1 tokens can be had, and tokens are whole: **at most L**. So a provider counts at most L
requests in any window of P, however it lays its windows, as long as the times that requests need
from token to provider differ by no more than ``JITTER`` (50 ms). What differs more can add what
had been granted in the excess. The price is a tenth of the rate at most (sustained: 0.90 L for
L = 1000 a second, 0.98 L a minute). A bucket that is not there starts empty.

``reserve`` is the part of the burst that the critical lane alone may take: at least one token
where L is 2 or more, which costs half of the rate at 2 a second and a seventh at 10. Since tokens
fill up from below, critical requests go first while it is low.

Tokens that were not used may be put back as long as nobody took from the bucket since: then it
stands as if they had never been taken. Later they are lost, since a token that comes back after
its window would be one too many in another.

Rate that yields
================
``factor`` scales the account's buckets for everybody. Throttled (429): x 0.7, once a second at
most, never under 0.05, and nothing at all before Retry-After. Each second with successes adds
0.05 of the configured limit until it is whole again.

Circuit breaker
===============
::

    closed     20 failures, and half of all, within 10 s         -> open for ``cool`` (5 s)
    open       grants nothing until then                         -> half-open
    half-open  grants 5 probes; 3 successes                      -> closed, ``cool`` 5 s
               a failure                                         -> open, ``cool`` doubled, <= 60 s
               not heard of for ``cool``                         -> 5 further probes

Failures are errors of the provider (5xx, timeouts, connections refused): neither a refused
address nor a 429 is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum

from schemas.reasons import Lane, RunStatus

SECOND_US = 1_000_000
JITTER_US = 50_000
FACTOR_FLOOR = 0.05
CUT = 0.7
RAISE_PER_SECOND = 0.05
WINDOW_US = 10 * SECOND_US
FAILURES = 20
FAILED_SHARE = 0.5
PROBES = 5
PROBES_GOOD = 3
COOL_US = 5 * SECOND_US
COOL_MOST_US = 60 * SECOND_US


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``amount`` requests in any ``period``."""

    amount: float
    period: timedelta = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """The bucket that keeps a limit. ``floor``: below it, only the critical lane takes."""

    refill_per_us: float
    burst: float
    floor: float


def plan(limit: Limit, reserve: float = 0.0) -> Plan:
    """The bucket of a limit. Raises ``ValueError`` for what can never grant anything.

    Amounts below one a period are one in as many periods; of others the whole part counts.
    """
    if not (limit.amount > 0 and math.isfinite(limit.amount) and limit.period > timedelta()):
        raise ValueError(f"a limit must be a positive number per positive period, not {limit}")
    if not 0 <= reserve < 1:
        raise ValueError(f"a reserve is a share from 0 to below 1, not {reserve}")
    period_us = limit.period // timedelta(microseconds=1)
    amount = limit.amount
    if amount < 1:
        period_us, amount = int(period_us / amount), 1.0
    whole = math.floor(amount)
    burst = max(1.0, whole * min(1 / 20, SECOND_US / period_us))
    if reserve:
        burst = max(burst, min(2.0, whole))
    floor = min(max(1.0, reserve * burst), burst - 1) if reserve else 0.0
    # A hair less than L + 1, so that no rounding makes it one more.
    refill = (whole + 1 - 1e-6 - burst) / (period_us + JITTER_US)
    return Plan(refill, burst, floor)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens at a time; ``serial`` counts those who took."""

    tokens: float
    at_us: int
    serial: int


@dataclass(frozen=True, slots=True)
class Account:
    """What all who send through a provider's account share beside its buckets."""

    factor: float = 1.0
    cut_us: int = 0
    changed_us: int = 0
    """When ``factor`` was last lowered, and last changed at all."""
    blocked_us: int = 0
    """Nothing is granted before."""
    window_us: int = 0
    ok: int = 0
    failed: int = 0
    until_us: int = 0
    """0: the circuit is closed. Else the end of its being open, or of waiting for probes."""
    half: bool = False
    probes: int = 0
    good: int = 0
    cool_us: int = COOL_US


class Circuit(Enum):
    """States of a route's circuit breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a take."""

    granted: int
    wait_ms: int
    """Until there may be more; 0 where all was granted, or where time alone changes nothing."""
    status: RunStatus | None
    """Of the run, ``None`` where none was named or none is known: known and running, or nothing
    is granted."""
    circuit: Circuit
    """Says CLOSED where the run's status refused first."""
    open_until_ms: int
    """The time on Redis's clock until which the circuit lets nothing through; 0 if it does."""
    serials: Mapping[str, int]
    """By bucket, names this take for ``put_back``; empty where nothing was granted."""


def refilled(bucket: Bucket | None, plan_: Plan, now_us: int) -> Bucket:
    """A bucket at ``now_us``. A clock that went back refills nothing."""
    if bucket is None:
        return Bucket(0.0, now_us, 0)
    passed = max(0, now_us - bucket.at_us)
    tokens = min(plan_.burst, bucket.tokens + passed * plan_.refill_per_us)
    return Bucket(tokens, now_us, bucket.serial)


def scaled(plan_: Plan, factor: float) -> Plan:
    """The bucket of an account whose rate yields."""
    burst = max(1.0, plan_.burst * factor)
    return Plan(plan_.refill_per_us * factor, burst, min(plan_.floor * factor, burst - 1))


def allowed(account: Account, n: int, now_us: int) -> tuple[Account, int, Circuit]:
    """How many of ``n`` the circuit lets through, and the account if probes are given out."""
    if account.until_us == 0:
        return account, n, Circuit.CLOSED
    if now_us >= account.until_us:
        account = replace(
            account, half=True, probes=PROBES, good=0, until_us=now_us + account.cool_us
        )
    if not account.half:
        return account, 0, Circuit.OPEN
    return account, min(n, account.probes), Circuit.HALF_OPEN


def report(
    account: Account, ok: int, failed: int, retry_after_us: int | None, now_us: int
) -> Account:
    """An account after these answers; ``retry_after_us`` is not ``None`` if any was throttled."""
    if retry_after_us is not None:
        blocked = max(account.blocked_us, now_us + retry_after_us)
        account = replace(account, blocked_us=blocked)
        if now_us - account.cut_us >= SECOND_US:
            cut = max(FACTOR_FLOOR, account.factor * CUT)
            account = replace(account, factor=cut, cut_us=now_us, changed_us=now_us)
    elif ok and account.factor < 1.0 and now_us - account.changed_us >= SECOND_US:
        raised = min(1.0, account.factor + RAISE_PER_SECOND)
        account = replace(account, factor=raised, changed_us=now_us)

    if account.until_us:
        if account.half and failed:
            cool = min(COOL_MOST_US, account.cool_us * 2)
            return replace(account, half=False, probes=0, cool_us=cool, until_us=now_us + cool)
        if account.half and account.good + ok >= PROBES_GOOD:
            account = replace(account, half=False, good=0, until_us=0, cool_us=COOL_US)
            return replace(account, window_us=now_us, ok=0, failed=0)
        return replace(account, good=account.good + ok) if account.half else account
    if now_us - account.window_us >= WINDOW_US:
        account = replace(account, window_us=now_us, ok=0, failed=0)
    account = replace(account, ok=account.ok + ok, failed=account.failed + failed)
    total = account.ok + account.failed
    if account.failed >= FAILURES and account.failed >= FAILED_SHARE * total:
        until = now_us + account.cool_us
        return replace(account, half=False, probes=0, until_us=until)
    return account


@dataclass(frozen=True, slots=True)
class RunShape:
    """What shaping knows of a run."""

    version: int
    status: RunStatus
    plan: Plan | None
    """``None`` is unlimited."""


class ShapingModel:
    """A shaping server in memory: the contract that ``sinks.shaping`` is held to."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.buckets: dict[str, Bucket] = {}
        self.runs: dict[str, RunShape] = {}

    def publish(self, run: str, shape: RunShape) -> bool:
        """Set what is known of a run, unless as new a version is known."""
        if run in self.runs and self.runs[run].version >= shape.version:
            return False
        self.runs[run] = shape
        return True

    def take(
        self,
        n: int,
        lane: Lane,
        account: str,
        limits: Sequence[tuple[str, Plan, bool]],
        run: str | None,
        now_us: int,
    ) -> Grant:
        """Take up to ``n`` tokens from all of ``limits`` (bucket, plan, whether the account's)."""
        shape = self.runs.get(run) if run is not None else None
        status = shape.status if shape else None
        state = self.accounts.get(account, Account())
        if run is not None and status is not RunStatus.RUNNING:
            return Grant(0, 0, status, Circuit.CLOSED, 0, {})
        state, grant, circuit = allowed(state, n, now_us)
        if circuit is Circuit.OPEN or (circuit is Circuit.HALF_OPEN and grant == 0):
            until = _milliseconds(state.until_us)
            return Grant(0, _milliseconds(state.until_us - now_us), status, circuit, until, {})
        if now_us < state.blocked_us:
            return Grant(0, _milliseconds(state.blocked_us - now_us), status, circuit, 0, {})

        plans = {name: scaled(p, state.factor) if own else p for name, p, own in limits}
        if run is not None and shape and shape.plan:
            plans[f"run/{run}"] = shape.plan
        floors = {name: 0.0 if lane is Lane.CRITICAL else p.floor for name, p in plans.items()}
        full = {name: refilled(self.buckets.get(name), p, now_us) for name, p in plans.items()}
        for name, bucket in full.items():
            grant = min(grant, max(0, math.floor(bucket.tokens - floors[name])))
        wait_us = 0.0
        for name, bucket in full.items():
            tokens = bucket.tokens - grant
            if grant:
                self.buckets[name] = Bucket(tokens, now_us, bucket.serial + 1)
            elif name not in self.buckets:
                self.buckets[name] = bucket
            wait_us = max(wait_us, (1 + floors[name] - tokens) / plans[name].refill_per_us)
        if grant and circuit is Circuit.HALF_OPEN:
            self.accounts[account] = replace(state, probes=state.probes - grant)
        serials = {name: bucket.serial + 1 for name, bucket in full.items()} if grant else {}
        wait = 0 if grant == n else _milliseconds(wait_us)
        return Grant(grant, wait, status, circuit, 0, serials)

    def put_back(self, n: int, serials: Mapping[str, int]) -> int:
        """Put unused tokens back where nobody took since. Answers into how many buckets."""
        done = 0
        for name, serial in serials.items():
            bucket = self.buckets.get(name)
            if bucket and bucket.serial == serial:
                self.buckets[name] = replace(bucket, tokens=bucket.tokens + n, serial=serial + 1)
                done += 1
        return done

    def report(
        self, account: str, ok: int, failed: int, retry_after_us: int | None, now_us: int
    ) -> Account:
        """Hear what the account's provider answered."""
        state = report(self.accounts.get(account, Account()), ok, failed, retry_after_us, now_us)
        self.accounts[account] = state
        return state


def _milliseconds(us: float) -> int:
    return max(0, math.ceil(us / 1000))
