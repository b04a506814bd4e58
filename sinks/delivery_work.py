"""What delivery's loop works on: sends that are not finished, and the lines they stand in.

A **work** is a send that is not finished. A **line** is a run's leg; its **streams** are the
messages that go one route, so that a route which waits holds up no other. Every message of a work
is in one place: ready or waiting in a stream, under way (in a batch, claimed, requested, being
settled), or completed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from heapq import heappop, heappush

from schemas.message import Provider
from schemas.pages import bitmap_from, indexes_of
from schemas.reasons import Outcome, Reason
from schemas.records import Route, Send
from sinks.ledger_desk import LedgerDesk
from sinks.permits import Permits
from transforms.delivery import Tries
from transforms.ledger import LedgerRef, Owner
from transforms.personalise import LegContext


@dataclass(slots=True)
class Account:
    """A provider's account: the adapter, its permits, and answers not yet reported."""

    route: Route
    name: str
    provider: Provider
    permits: Permits
    accepted: int = 0
    failed: int = 0
    throttled: timedelta | None = None


@dataclass(slots=True)
class Key:
    """A delivery key in this process.

    ``owed`` and ``empty`` belong to the operator's thread, the rest to the loop's, but for
    ``outbox``: the loop appends, the operator takes.
    """

    number: int
    outbox: deque[Completion] = field(default_factory=deque)
    owed: dict[str, int] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    desks: dict[LedgerRef, LedgerDesk] = field(default_factory=dict)
    owner: asyncio.Future[Owner] | None = None
    fenced: Exception | None = None
    under_way: int = 0


@dataclass(slots=True)
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
    repeated: bool = False
    """An earlier request may have arrived as well: the critical lane alone sends then."""


class Work:
    """A send that is not finished."""

    __slots__ = ("desk", "key", "left", "line", "name", "send", "tries")

    def __init__(self, key: Key, name: str, send: Send, line: Line, desk: LedgerDesk) -> None:
        self.key = key
        self.name = name
        self.send = send
        self.line = line
        self.desk = desk
        self.left = bitmap_from(send.ordinals).bit_count()
        self.tries: dict[int, Tries] = {}
        """Of messages that were refused before."""

    def tries_of(self, index: int) -> Tries:
        """How often a message was refused."""
        return self.tries.get(index, _UNTRIED)


_UNTRIED = Tries()


@dataclass(slots=True)
class Batch:
    """Messages of one work that go one route together. They are under way."""

    work: Work
    stream: Stream
    indexes: list[int]

    def keep(self, count: int) -> None:
        """Give all but the first ``count`` messages back, to be the next."""
        rest = self.indexes[count:]
        if rest:
            del self.indexes[count:]
            self.stream.back(self.work, rest)


@dataclass(slots=True)
class _Share:
    """What a stream holds of one work."""

    ready: deque[int] = field(default_factory=deque)
    waiting: list[tuple[float, int]] = field(default_factory=list)


class Stream:
    """The messages of a line that go one route, oldest work first."""

    def __init__(self, line: Line, route: int, account: Account | None) -> None:
        self.line = line
        self.route = route
        self.account = account
        """None where nothing can be sent: the line is broken, or has no such route here."""
        self.news = asyncio.Event()
        self.parked = False
        """Whether nothing will happen for a while, for the operator to look less often."""
        self.unheard = False
        """Whether Redis did not answer when last asked for tokens."""
        self.task: asyncio.Task[None] | None = None
        self._shares: dict[Work, _Share] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing is ready and nothing waits."""
        return not self._shares

    def add(self, work: Work, indexes: Sequence[int]) -> None:
        """New messages, after all others."""
        self._share(work).ready.extend(indexes)
        self.news.set()

    def back(self, work: Work, indexes: Sequence[int]) -> None:
        """Messages that were under way and did not get through, before all others of the work."""
        work.key.under_way -= len(indexes)
        self._share(work).ready.extendleft(reversed(indexes))
        self.news.set()

    def wait(self, work: Work, index: int, at: float) -> None:
        """A message that was under way is ready again at a moment of the loop's clock."""
        work.key.under_way -= 1
        heappush(self._share(work).waiting, (at, index))
        self.news.set()

    def next_batches(self, now: float, size: int, total: int) -> list[Batch]:
        """Up to ``total`` messages, of oldest works first: up to ``size`` for each desk with room.

        No desk has two of the batches: it hears of them only when all have their tokens.
        """
        found: list[Batch] = []
        spent = []
        chosen: set[int] = set()
        for work, share in self._shares.items():
            waiting = share.waiting
            while waiting and waiting[0][0] <= now:
                share.ready.append(heappop(waiting)[1])
            desk = work.desk
            if not share.ready or desk.busy or id(desk) in chosen:
                continue
            count = min(size, total, len(share.ready))
            indexes = [share.ready.popleft() for _ in range(count)]
            work.key.under_way += count
            if not (share.ready or waiting):
                spent.append(work)
            chosen.add(id(desk))
            found.append(Batch(work, self, indexes))
            total -= count
            if not total:
                break
        for work in spent:
            del self._shares[work]
        return found

    def soonest(self) -> float | None:
        """When the next waiting message is due."""
        return min(
            (share.waiting[0][0] for share in self._shares.values() if share.waiting), default=None
        )

    def drop(self, key: Key) -> None:
        """Forget the messages of a delivery key: it has a new owner."""
        for work in [work for work in self._shares if work.key is key]:
            del self._shares[work]

    def _share(self, work: Work) -> _Share:
        share = self._shares.get(work)
        if share is None:
            share = self._shares[work] = _Share()
        return share


def indexes_owed(send: Send) -> list[int]:
    """The page-relative indexes of a send's recipients."""
    return indexes_of(bitmap_from(send.ordinals))


@dataclass(slots=True)
class Line:
    """A run's leg. ``broken`` says why nothing of it can be sent, where that is so."""

    name: tuple[str, str, str, str]
    """Tenant, run, leg, spec."""
    context: LegContext | None
    broken: tuple[Reason, str] | None
    streams: dict[int, Stream] = field(default_factory=dict)
    left: int = 0
    """Messages that are not completed."""
    since: float = 0.0
    """Since when nothing is left, on the loop's clock."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.name[0]

    @property
    def run(self) -> str:
        """The run."""
        return self.name[1]

    @property
    def routes(self) -> int:
        """How many routes a message may take."""
        return len(self.context.routes) if self.context is not None else 1
