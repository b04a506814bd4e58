"""State layouts: what Flink keeps for us, as our own versioned bytes.

Never pickled classes: a class may be renamed, old bytes must still load. Golden bytes of every
past layout are kept in ``tests/schemas/golden``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant
from schemas.reasons import RunStatus
from schemas.records import ConsentStatus


@dataclass(frozen=True, slots=True)
class ConsentEntry:
    """The latest word on one channel and topic (each may be ``*``)."""

    channel: str
    topic: str
    status: ConsentStatus
    at: datetime


@dataclass(frozen=True, slots=True)
class Reservation:
    """A message counted against the caps, keyed by run and leg.

    It is *open* until its generation's outcome is known, then *settled* (accepted or unknown: kept,
    it leaves only by age) or *refunded* (not sent: it counts nowhere). An open one is counted in
    every window, whatever its age. A refunded one is remembered, because a late word that the
    message was accepted after all makes it count again.
    """

    run: RunId
    leg: LegId
    generation: int
    at: datetime
    """The latest moment at which the message can have left: ``valid_until`` when it was decided,
    lowered to the time of its outcome. What counts in a window is what has ``at`` in it."""
    channel: str
    category: str
    """Of the campaign, frozen at decision."""
    settled: bool
    refunded: bool = False


@dataclass(frozen=True, slots=True)
class RecipientState:
    """All that decide remembers of a person."""

    tenant: Tenant
    consents: tuple[ConsentEntry, ...]
    reservations: tuple[Reservation, ...]


@dataclass(frozen=True, slots=True)
class LegState:
    """Where a leg stands.

    Pages are ordered across shards: all first pages, then all second pages. ``next_page`` and
    ``next_shard`` are the first page never ordered, so they are the cursors of all 256 shards.
    """

    leg: LegId
    next_page: int
    next_shard: int
    unordered: int
    """Recipients in pages never ordered."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Coordinate's memory of a run, without its pages (see ``PageState``)."""

    tenant: Tenant
    run: RunId
    campaign: str
    spec: ObjectId
    snapshot: SnapshotId
    status: RunStatus
    version: int
    """Grows with every change of status or rate; what Redis holds is compared by it."""
    published_version: int
    """The version that Redis is known to have."""
    ledger_ready: bool
    legs: tuple[LegState, ...]
    shard_counts: tuple[int, ...]
    """Recipients of each shard of the snapshot."""
    rate_per_second: float | None
    commands: tuple[str, ...]
    """Ids of the last commands that were carried out or refused."""
    start_at: datetime | None
    deadline: datetime
    launched_at: datetime
    issued_until: datetime | None = None
    """When the newest command was issued, by its own word but no later than it came."""


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """An order whose ordinals are not all resolved."""

    generation: int
    unresolved: bytes
    """Bitmap of the page."""
    ordered_at: datetime
    heard: bool
    """Whether decide's result has come back."""


@dataclass(frozen=True, slots=True)
class Deferral:
    """Recipients of a page that are to be ordered again at ``wake``."""

    wake: datetime
    ordinals: bytes


@dataclass(frozen=True, slots=True)
class PageState:
    """What is open of a page of a leg; kept afterwards while its generation is above zero."""

    generation: int
    """The highest given so far."""
    orders: tuple[OpenOrder, ...]
    """Disjoint from each other and from the deferrals."""
    deferrals: tuple[Deferral, ...]
