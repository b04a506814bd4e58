"""What delivery's loop works on: sends that are not finished, and the lines they stand in."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from heapq import heappop, heappush

from schemas.pages import bitmap_from, indexes_of
from schemas.reasons import Outcome, Reason
from schemas.records import Send
from sinks.ledger_desk import LedgerDesk
from transforms.delivery import Tries
from transforms.personalise import LegContext


@dataclass(frozen=True, slots=True)
class Completion:
    """One recipient's outcome, in the ledger and not yet emitted."""

    work: Work
    index: int
    outcome: Outcome
    reason: Reason
    generation: int
    provider: str
    provider_id: str
    attempts: int
    detail: str
    at: datetime
    recipient: str = ""
    """Only where the address is to be suppressed."""


class Work:
    """A send that is not finished."""

    __slots__ = (
        "context",
        "desk",
        "key",
        "left",
        "line",
        "name",
        "ready",
        "send",
        "tries",
        "waiting",
    )

    def __init__(self, key: int, name: str, send: Send, line: Line, desk: LedgerDesk) -> None:
        self.key = key
        self.name = name
        self.send = send
        self.line = line
        self.desk = desk
        self.ready: deque[int] = deque(indexes_of(bitmap_from(send.ordinals)))
        self.left = len(self.ready)
        self.waiting: list[tuple[float, int]] = []
        self.tries: dict[int, Tries] = {}

    def wait(self, index: int, at: float) -> None:
        """Keep a message until a moment of the loop's clock."""
        heappush(self.waiting, (at, index))

    def due(self, now: float) -> None:
        """Make ready what has waited long enough."""
        while self.waiting and self.waiting[0][0] <= now:
            self.ready.append(heappop(self.waiting)[1])


@dataclass(slots=True)
class Batch:
    """Messages of one work that go one route together."""

    work: Work
    route: int
    indexes: list[int]


class Line:
    """A run's leg: the works that take turns."""

    def __init__(self, tenant: str, run: str, leg: str) -> None:
        self.tenant = tenant
        self.run = run
        self.leg = leg
        self.works: deque[Work] = deque()
        self.news = asyncio.Event()
        self.parked = False
        self.task: asyncio.Task[None] | None = None
        self.context: LegContext | None = None
        self.broken: Reason | None = None

    def next_batch(self, now: float, size: int) -> Batch | None:
        """A batch of the first work with something ready; works take turns."""
        for _ in range(len(self.works)):
            work = self.works[0]
            if work.left == 0:
                self.works.popleft()
                continue
            self.works.rotate(-1)
            work.due(now)
            if work.ready:
                first = work.ready.popleft()
                route = _route(work, first)
                indexes = [first]
                while work.ready and len(indexes) < size and _route(work, work.ready[0]) == route:
                    indexes.append(work.ready.popleft())
                return Batch(work, route, indexes)
        return None

    def soonest(self) -> float | None:
        """When the next waiting message is due."""
        return min((work.waiting[0][0] for work in self.works if work.waiting), default=None)


def _route(work: Work, index: int) -> int:
    tries = work.tries.get(index)
    return tries.route if tries is not None else 0
