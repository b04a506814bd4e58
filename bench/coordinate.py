"""What coordinate costs a page, in Python alone: part of ``make bench SECTION=scaling``.

Every page is ordered, put off by quiet hours to one and the same moment, ordered again within a
window of 24 pages, and accepted: the case in which most is remembered and looked for.
"""

from __future__ import annotations

import gc
import statistics
import time
from datetime import UTC, datetime, timedelta

from bench.harness import SMTP, TENANT, campaign
from schemas.ids import ObjectId, RunId
from schemas.pages import PAGE_SIZE
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import (
    Command,
    CommandKind,
    DeferGroup,
    OutcomeGroup,
    Outcomes,
    PageOrder,
    PageResult,
)
from transforms.coordinate import CoordinatePolicy, Coordinator, LaunchFacts, RunMemory
from transforms.decide import page_result

_RUN = RunId("coordinated")
_AWAKE = timedelta(hours=1)


def _result(order: PageOrder, now: datetime, until: datetime | None) -> PageResult:
    if until is None:
        return page_result(order, now, order.ordinals, (), ())
    put_off = DeferGroup(Reason.QUIET_HOURS, until, order.ordinals)
    return page_result(order, now, b"", (), (put_off,))


def _accepted(order: PageOrder, now: datetime) -> Outcomes:
    everybody = tuple(range(PAGE_SIZE))
    return Outcomes(
        order.tenant,
        order.run,
        order.leg,
        order.snapshot,
        order.shard,
        order.page,
        now,
        (
            OutcomeGroup(
                Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, "", order.generation, everybody
            ),
        ),
    )


def measure(people: int, times: int = 3) -> float:
    """Microseconds of processor time a page of a campaign to so many: the median of some runs."""
    return statistics.median(_once(people) for _ in range(times))


def _once(people: int) -> float:
    pages = people // PAGE_SIZE
    now = datetime.now(UTC)
    spec = campaign(_RUN, "s" * 20, SMTP)
    launch = Command("launch", TENANT, _RUN, CommandKind.LAUNCH, now, "bench", launch=spec)
    coordinator = Coordinator(RunMemory(), CoordinatePolicy(window=24 * PAGE_SIZE))
    gc.collect()  # what earlier measurements left is not coordinate's to look through
    began = time.thread_time()
    coordinator.on_command(launch, now, LaunchFacts(ObjectId("5" * 64), (pages * PAGE_SIZE,)))
    orders = coordinator.on_ledger_created(now).orders
    until = now + _AWAKE
    finished = 0
    while orders:
        given: list[PageOrder] = []
        for order in orders:
            first = order.generation == 0
            given += coordinator.on_result(
                _result(order, now, until if first else None), now
            ).orders
            if not first:
                given += coordinator.on_outcomes(_accepted(order, now), now).orders
                finished += 1
        if not given and now < until:
            now = until
            given = coordinator.on_tick(now).orders
        orders = given
    spent = time.thread_time() - began
    run = coordinator.memory.run
    if finished != pages or run is None or run.status is not RunStatus.COMPLETED:
        raise RuntimeError(f"{finished} of {pages} pages were finished: {run}")
    return spent / pages * 1e6
