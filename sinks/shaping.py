"""Shaping on Redis: the tokens that a request needs before it is claimed.

``transforms.shaping`` has the arithmetic and says what a limit guarantees; here it runs as Lua
scripts on Redis's clock, so that all processes share one account, tenant and run bucket. All keys
share the hash tag ``{fshape}``::

    fanfare:{fshape}:account:PROVIDER/ACCOUNT   hash: factor, blocked, circuit breaker
    fanfare:{fshape}:bucket:NAME                tokens, time (us), serial: three doubles
    fanfare:{fshape}:run:TENANT/RUN             hash: version, status, ... (sinks.runs)

Limits come in with each call, so that nothing need be set up; a run's own rate is what
``sinks.runs.publish`` says. All calls may be repeated after ``Unavailable``: what a lost take had
granted is lost, which keeps every limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from schemas.ids import RunId, Tenant
from schemas.reasons import Lane, RunStatus
from schemas.records import Route
from sinks.ledger_layout import run_name
from sinks.redis_client import AsyncClient, script, unavailable
from transforms import shaping as rules
from transforms.shaping import Circuit, Grant, Limit, plan

SHAPE = "fanfare:{fshape}:"

_TAKE = script("take", PROBES=rules.PROBES, COOL_US=rules.COOL_US)
_PUT_BACK = script("put_back")
_REPORT = script(
    "report",
    SECOND_US=rules.SECOND_US,
    FACTOR_FLOOR=rules.FACTOR_FLOOR,
    CUT=rules.CUT,
    RAISE_PER_SECOND=rules.RAISE_PER_SECOND,
    WINDOW_US=rules.WINDOW_US,
    FAILURES=rules.FAILURES,
    FAILED_SHARE=rules.FAILED_SHARE,
    PROBES_GOOD=rules.PROBES_GOOD,
    COOL_US=rules.COOL_US,
    COOL_MOST_US=rules.COOL_MOST_US,
)
_STATUS = {status.value.encode(): status for status in RunStatus}
_CIRCUIT = {circuit.value.encode(): circuit for circuit in Circuit}


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one provider's account, and of a tenant; empty is unlimited.

    ``reserve``: the share of the account's burst that the critical lane alone may take.
    """

    account: tuple[Limit, ...] = ()
    tenant: tuple[Limit, ...] = ()
    reserve: float = 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How an account stands after a report."""

    factor: float
    """What is left of its rate: 1 is all."""
    blocked_until: datetime
    circuit: Circuit
    open_until: datetime
    """Long past unless the circuit is open."""


@dataclass(frozen=True, slots=True)
class _Layout:
    account: str
    run: str | None
    buckets: tuple[str, ...]
    take_arguments: tuple[Any, ...]


def run_key(tenant: str, run: str) -> str:
    """The key of a run's status where shaping reads it."""
    return f"{SHAPE}run:{run_name(tenant, run)}"


def run_bucket(tenant: str, run: str) -> str:
    """The key of a run's own bucket."""
    return f"{SHAPE}bucket:run/{run_name(tenant, run)}"


def _account_key(route: Route) -> str:
    return f"{SHAPE}account:{quote(route.provider, safe='')}/{quote(route.account, safe='')}"


@lru_cache(maxsize=4096)
def _layout(route: Route, tenant: Tenant, run: RunId | None, limits: Limits) -> _Layout:
    account = _account_key(route)
    name = account.removeprefix(f"{SHAPE}account:")
    buckets, arguments = [], []
    for which, key, reserve in (
        (limits.account, f"account/{name}", limits.reserve),
        (limits.tenant, f"tenant/{quote(tenant, safe='')}", 0.0),
    ):
        for limit in which:
            each = plan(limit, reserve)
            own = int(which is limits.account)
            buckets.append(f"{SHAPE}bucket:{key}/{limit.period // timedelta(milliseconds=1)}")
            arguments += [repr(each.refill_per_us), repr(each.burst), repr(each.floor), own]
    if run is not None:
        buckets.append(run_bucket(tenant, run))
    return _Layout(
        account,
        run_key(tenant, run) if run is not None else None,
        tuple(buckets),
        tuple(arguments),
    )


async def take(
    client: AsyncClient,
    n: int,
    lane: Lane,
    route: Route,
    limits: Limits,
    tenant: Tenant,
    run: RunId | None,
) -> Grant:
    """Take up to ``n`` tokens to send through ``route``; all limits grant them, or none does.

    Nothing is granted unless the run is known here and running; without a run (a notification)
    its status isn't asked for, which only the critical lane may. Raises ``Unavailable``, and
    ``ValueError`` for a promotional take without a run.
    """
    return (await take_at(client, n, lane, route, limits, tenant, run))[0]


async def take_at(
    client: AsyncClient,
    n: int,
    lane: Lane,
    route: Route,
    limits: Limits,
    tenant: Tenant,
    run: RunId | None,
) -> tuple[Grant, int]:
    """As ``take``, with the time on Redis's clock, in microseconds."""
    if run is None and lane is Lane.PROMOTIONAL:
        raise ValueError("promotional tokens are taken for a run: without one nobody can pause it")
    at = _layout(route, tenant, run, limits)
    keys = (at.account, at.run, *at.buckets) if at.run else (at.account, *at.buckets)
    with unavailable("take tokens"):
        answer = await _TAKE.run_async(
            client, keys, [n, lane.value, int(run is not None), *at.take_arguments]
        )
    granted, wait_ms, status, circuit, until_ms, now_us, *serials = answer
    named = dict(zip(at.buckets, serials, strict=False))  # a run's last, if it has a rate
    status_, circuit_ = _STATUS.get(status), _CIRCUIT[circuit]
    return Grant(granted, wait_ms, status_, circuit_, until_ms, named), now_us


async def put_back(client: AsyncClient, n: int, grant: Grant) -> int:
    """Put ``n`` tokens of a grant back that no request used; where it is too late they are lost.

    Answers into how many buckets. Raises ``Unavailable``; a repeat puts nothing back twice.
    """
    if not 0 <= n <= grant.granted:
        raise ValueError(f"{n} tokens can't be put back of {grant.granted} granted")
    if n == 0 or not grant.serials:
        return 0
    with unavailable("put tokens back"):
        done: int = await _PUT_BACK.run_async(
            client, tuple(grant.serials), [n, *grant.serials.values()]
        )
    return done


async def report(
    client: AsyncClient,
    route: Route,
    ok: int = 0,
    failed: int = 0,
    retry_after: timedelta | None = None,
) -> Standing:
    """Tell everybody what a provider answered: how many it took, and failed to take.

    ``retry_after``: one was throttled (429); zero where the provider named no time. Neither
    throttled nor refused messages are ``failed``. Raises ``Unavailable``; a repeat may count
    twice, which only makes the rate yield sooner.
    """
    return (await report_at(client, route, ok, failed, retry_after))[0]


async def report_at(
    client: AsyncClient, route: Route, ok: int, failed: int, retry_after: timedelta | None
) -> tuple[Standing, int]:
    """As ``report``, with the time on Redis's clock, in microseconds."""
    after = "" if retry_after is None else retry_after // timedelta(microseconds=1)
    with unavailable("report a provider's answers"):
        answer = await _REPORT.run_async(client, (_account_key(route),), [ok, failed, after])
    factor, blocked_ms, circuit, until_ms, now_us = answer
    standing = Standing(factor / 1e6, _time(blocked_ms), _CIRCUIT[circuit], _time(until_ms))
    return standing, now_us


def _time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


__all__: Sequence[str] = [
    "Circuit",
    "Grant",
    "Limit",
    "Limits",
    "Standing",
    "put_back",
    "report",
    "run_bucket",
    "run_key",
    "take",
]
