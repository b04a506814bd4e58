"""Unknown outcomes: what webhooks prove of them, listing them, and settling them by hand.

``Settler`` is what the webhook-ingest job is given; the rest serves ``fanfare unknowns``.

By hand, in this order, each step safe to repeat: the ledger (the held matter that was seen, and no
other, becomes the accepted bit, or nothing), then the record that tells everybody (an accepted
outcome, or the order to send again), then the audit event. A person who is interrupted between
finds the message in the list as *accepted, not told* or *released, not ordered*, and settles it
again the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Protocol

from clickhouse_connect.driver.client import Client as ClickHouse

from schemas.codec import encode, from_millis
from schemas.errors import Corrupt, Missing, Unavailable
from schemas.ids import LegId, RunId, SnapshotId, Tenant, derive
from schemas.pages import PAGE_SIZE, SHARDS, bitmap_bytes, bitmap_of
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import (
    Command,
    CommandKind,
    OutcomeGroup,
    Outcomes,
    Reorder,
    RunEvent,
)
from schemas.tables import ENGAGEMENT, MAX_GENERATION, STEPS
from sinks import ledger_upkeep
from sinks.audit import audit_event
from sinks.books import RunFacts, utc
from sinks.clickhouse import asking, connect
from sinks.redis_client import Client as Redis
from sinks.redis_client import connect as connect_redis
from transforms.ledger import Entry, Held, LedgerRef
from transforms.reconcile import Proof
from transforms.webhooks import parse_ref

_REDIS_TIMEOUT = timedelta(seconds=2)
"""Flink's thread waits no longer; what was not done is done at the next look."""
PAGES_A_COMMAND = 2_000
"""Pages that one order to send again names: some 200 KB of Kafka's 1 MB."""

_PROOFS = f"""
SELECT send_id, argMax(provider_id, (provider_id != '', event_id)) AS own,
    argMin(ref, (at, event_id)) AS told, argMin(provider, (at, event_id)) AS whose
FROM {ENGAGEMENT.name}
PREWHERE tenant = {{tenant:String}} AND run = {{run:String}} AND (shard = -1
    OR shard IN {{shards:Array(Int16)}} AND ordinal IN {{ordinals:Array(Int64)}})
WHERE send_id IN {{sends:Array(String)}}
GROUP BY send_id"""  # noqa: S608

_TOLD = f"""
SELECT leg, shard, ordinal, max(generation) AS newest,
    maxIf(generation, kind = 'unknown') AS doubted,
    argMaxIf(provider, generation, kind = 'unknown') AS whose,
    minIf(at, kind = 'send') AS decided, minIf(at, kind = 'unknown') AS told,
    maxIf(attempts, kind = 'unknown') AS attempts
FROM {STEPS.name}
WHERE tenant = {{tenant:String}} AND run = {{run:String}} AND (leg, shard, ordinal) IN (
    SELECT leg, shard, ordinal FROM {STEPS.name}
    WHERE tenant = {{tenant:String}} AND run = {{run:String}} AND kind = 'unknown')
GROUP BY leg, shard, ordinal
HAVING countIf(kind = 'accepted') = 0"""  # noqa: S608


class Settler:
    """Ledger and events as the webhook-ingest job asks them; for one thread.

    ClickHouse is connected at first need, and anew after a failure.
    """

    def __init__(self, redis: Redis, clickhouse: str) -> None:
        self._redis = redis
        self._url = clickhouse
        self._clickhouse: ClickHouse | None = None

    def entries(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
        """What the ledger says of these. Raises MissingLedger, Corrupt, Unavailable."""
        return ledger_upkeep.entries(self._redis, ref, ordinals)

    def reconcile(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
        """Claims and unknowns become accepted; what stands now."""
        return ledger_upkeep.reconcile(self._redis, ref, ordinals)

    def proofs(
        self, tenant: Tenant, run: RunId, sends: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Proof]:
        """What providers' events prove of these send ids, each with its shard and ordinal."""
        if self._clickhouse is None:
            self._clickhouse = connect(self._url)
        try:
            return proofs(self._clickhouse, tenant, run, sends)
        except Unavailable:
            self._drop()
            raise

    def _drop(self) -> None:
        client, self._clickhouse = self._clickhouse, None
        if client is not None:
            client.close()

    def close(self) -> None:
        """Let the connections go."""
        self._drop()
        self._redis.close()


def connect_settler(redis: str, clickhouse: str) -> Settler:
    """The settler of these URLs; nothing is connected yet."""
    return Settler(connect_redis(redis, _REDIS_TIMEOUT), clickhouse)


def proofs(
    client: ClickHouse, tenant: Tenant, run: RunId, sends: Mapping[str, tuple[int, int]]
) -> dict[str, Proof]:
    """What events prove of these send ids, each with its shard and ordinal.

    Place narrows what is read, the send id decides; an event without a place is found too. The
    same whatever duplicates the table holds.
    """
    if not sends:
        return {}
    rows = asking(
        client,
        _PROOFS,
        {
            "tenant": tenant,
            "run": run,
            "shards": sorted({shard for shard, _ in sends.values()}),
            "ordinals": sorted({ordinal for _, ordinal in sends.values()}),
            "sends": sorted(sends),
        },
    ).result_rows
    found = {}
    for send, own, told, whose in rows:
        ref = parse_ref(told)
        generation = ref[2] if ref is not None and ref[2] <= MAX_GENERATION else None
        found[str(send)] = Proof(Reason.SETTLED_BY_WEBHOOK, str(whose), str(own), generation)
    return found


class Standing(Enum):
    """How an unknown stands."""

    HELD = "held"
    """In the ledger: nothing is sent until it is settled."""
    ACCEPTED_NOT_TOLD = "accepted, not told"
    """The ledger has the accepted bit; the outcome is on its way, or a settling was broken off."""
    RELEASED_NOT_ORDERED = "released, not ordered"
    """The ledger lets it be sent again; the order is on its way, or a settling was broken off."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """One message of whom nobody knows whether it was sent."""

    leg: LegId
    shard: int
    ordinal: int
    recipient: str
    standing: Standing
    provider: str
    generation: int
    attempt: int
    reason: str
    since: datetime
    """When it was held, by the ledger's clock; for the others, when the outcome was told."""
    decided: datetime | None
    """When it was decided to be sent; None where ClickHouse has not heard of it."""
    held: Held | None

    @property
    def page(self) -> int:
        """Its page."""
        return self.ordinal // PAGE_SIZE

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "leg": self.leg,
            "shard": self.shard,
            "ordinal": self.ordinal,
            "recipient": self.recipient,
            "standing": self.standing.value,
            "provider": self.provider,
            "generation": self.generation,
            "attempt": self.attempt,
            "reason": self.reason,
            "since": self.since.isoformat(),
            "decided": None if self.decided is None else self.decided.isoformat(),
        }


class PageIds(Protocol):
    """A page's recipients."""

    @property
    def recipient_ids(self) -> Sequence[str]:
        """Ids by position in the page."""


class ReadableSnapshot(Protocol):
    """A snapshot whose pages can be read."""

    def read_index(self, shard: int, page: int) -> PageIds:
        """A page. Raises CorruptPage."""


def list_unknowns(
    redis: Redis,
    clickhouse: ClickHouse,
    tenant: Tenant,
    run: RunId,
    facts: RunFacts,
    snapshot: ReadableSnapshot,
) -> list[Unknown]:
    """The unknowns of a run: those that the ledger holds, and broken-off settlements.

    Raises:
        MissingLedger: the run's ledger is gone.
        Unavailable, Refused: Redis or ClickHouse.
    """
    told = _told(clickhouse, tenant, run)
    found: list[Unknown] = []
    for leg in map(LegId, facts.legs):
        for shard in range(SHARDS):
            if not facts.shard_counts[shard]:
                continue
            ref = LedgerRef(tenant, run, leg, shard)
            rows = told.get((leg, shard), {})
            matters = ledger_upkeep.list_open(redis, ref)
            found += [
                _held(ref, ordinal, matter, rows.get(ordinal), snapshot)
                for ordinal, matter in matters.items()
                if isinstance(matter, Held)
            ]
            found += _broken_off(redis, ref, rows.values(), snapshot)
    return found


@dataclass(frozen=True, slots=True)
class _Told:
    """What ClickHouse says of a message whose outcome is unknown."""

    ordinal: int
    newest: int
    doubted: int
    provider: str
    decided: datetime | None
    told: datetime
    attempts: int


def _told(
    clickhouse: ClickHouse, tenant: Tenant, run: RunId
) -> dict[tuple[str, int], dict[int, _Told]]:
    """By leg and shard, then by ordinal."""
    rows = asking(clickhouse, _TOLD, {"tenant": tenant, "run": run}).result_rows
    found: dict[tuple[str, int], dict[int, _Told]] = defaultdict(dict)
    for leg, shard, ordinal, newest, doubted, provider, decided, told, attempts in rows:
        decided_at = utc(decided)
        found[str(leg), int(shard)][int(ordinal)] = _Told(
            int(ordinal),
            int(newest),
            int(doubted),
            str(provider),
            decided_at if decided_at.year > 1970 else None,
            utc(told),
            int(attempts),
        )
    return found


def _held(
    ref: LedgerRef, ordinal: int, held: Held, row: _Told | None, snapshot: ReadableSnapshot
) -> Unknown:
    return Unknown(
        ref.leg,
        ref.shard,
        ordinal,
        _recipient(snapshot, ref.shard, ordinal),
        Standing.HELD,
        held.provider,
        held.generation,
        held.attempt + 1,
        held.reason.value,
        from_millis(held.at_ms),
        row.decided if row is not None else None,
        held,
    )


def _broken_off(
    redis: Redis, ref: LedgerRef, rows: Iterable[_Told], snapshot: ReadableSnapshot
) -> list[Unknown]:
    """Told as unknown, not held, and nothing was told of a later generation."""
    found: list[Unknown] = []
    late = [row for row in rows if row.newest <= row.doubted]
    if not late:
        return found
    entries = ledger_upkeep.entries(redis, ref, [row.ordinal for row in late])
    for row, entry in zip(late, entries, strict=True):
        if entry.matter is not None:
            continue
        standing = Standing.ACCEPTED_NOT_TOLD if entry.accepted else Standing.RELEASED_NOT_ORDERED
        found.append(
            Unknown(
                ref.leg,
                ref.shard,
                row.ordinal,
                _recipient(snapshot, ref.shard, row.ordinal),
                standing,
                row.provider,
                row.doubted,
                row.attempts,
                "",
                row.told,
                row.decided,
                None,
            )
        )
    return found


def _recipient(snapshot: ReadableSnapshot, shard: int, ordinal: int) -> str:
    ids = snapshot.read_index(shard, ordinal // PAGE_SIZE).recipient_ids
    if ordinal % PAGE_SIZE >= len(ids):
        raise Corrupt(f"ordinal {ordinal} of shard {shard} is not in the run's snapshot")
    return ids[ordinal % PAGE_SIZE]


@dataclass(frozen=True, slots=True)
class ByHand:
    """Who settles, and why."""

    by: str
    note: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Settled:
    """What settling did. The records are still to be written, in this order."""

    settled: tuple[Unknown, ...]
    changed: tuple[Unknown, ...]
    """Something else stands in the ledger now than was listed: look again."""
    outcomes: tuple[Outcomes, ...] = ()
    audit: tuple[RunEvent, ...] = ()
    commands: tuple[Command, ...] = ()

    def records(self) -> tuple[bytes, ...]:
        """What is to be written, encoded."""
        return tuple(map(encode, (*self.outcomes, *self.audit, *self.commands)))


def refusal_to_send_again(status: RunStatus | None, deadline: datetime, now: datetime) -> str:
    """Why coordinate would not order again; empty: it will. To be asked before the ledger is."""
    if status in (RunStatus.CANCELLED, RunStatus.EXPIRED, RunStatus.REFUSED):
        return f"the run is {status.value}: nothing is ordered again"
    if status is None:
        return "Redis does not know the run: pause and resume it, or rebuild its ledger, first"
    if now >= deadline:
        return f"the run's deadline {deadline.isoformat()} has passed"
    return ""


def settle_accepted(
    redis: Redis,
    tenant: Tenant,
    run: RunId,
    snapshot: SnapshotId,
    status: RunStatus,
    unknowns: Iterable[Unknown],
    hand: ByHand,
) -> Settled:
    """Settle unknowns as accepted, in the ledger; what is to be written next. May be repeated."""
    settled, changed = _in_ledger(redis, tenant, run, unknowns, Standing.ACCEPTED_NOT_TOLD)
    pages: dict[tuple[LegId, int, int], list[Unknown]] = defaultdict(list)
    for one in settled:
        pages[one.leg, one.shard, one.page].append(one)
    outcomes = tuple(
        Outcomes(tenant, run, leg, snapshot, shard, page, hand.at, _groups(members))
        for (leg, shard, page), members in sorted(pages.items())
    )
    if not settled:
        return Settled(settled, changed)
    event = audit_event(
        derive("settled-by-hand", (tenant, run, *map(_identity, settled))),
        tenant,
        run,
        snapshot,
        status,
        hand.by,
        f"unknown, settled by hand as accepted ({_named(settled)}): {hand.note}",
        hand.at,
    )
    return Settled(settled, changed, outcomes, (event,))


def settle_send_again(
    redis: Redis, tenant: Tenant, run: RunId, unknowns: Iterable[Unknown], hand: ByHand
) -> Settled:
    """Let unknowns be sent again, in the ledger; the commands that order it. May be repeated.

    Ask ``refusal_to_send_again`` first.
    """
    settled, changed = _in_ledger(redis, tenant, run, unknowns, Standing.RELEASED_NOT_ORDERED)
    pages: dict[tuple[LegId, int, int], list[Unknown]] = defaultdict(list)
    for one in settled:
        pages[one.leg, one.shard, one.page].append(one)
    commands = []
    places = sorted(pages)
    for begin in range(0, len(places), PAGES_A_COMMAND):
        some = places[begin : begin + PAGES_A_COMMAND]
        members = [one for place in some for one in pages[place]]
        commands.append(
            Command(
                # Derived: a command that is written twice is carried out once.
                command_id=derive("send-again", (tenant, run, *map(_identity, members))),
                tenant=tenant,
                run=run,
                kind=CommandKind.REORDER,
                issued_at=hand.at,
                issued_by=hand.by,
                note=f"unknown, to be sent again ({_named(members)}): {hand.note}",
                reorders=tuple(
                    Reorder(leg, shard, page, _bitmap(pages[leg, shard, page]))
                    for leg, shard, page in some
                ),
            )
        )
    return Settled(settled, changed, commands=tuple(commands))


def _in_ledger(
    redis: Redis, tenant: Tenant, run: RunId, unknowns: Iterable[Unknown], repeat: Standing
) -> tuple[tuple[Unknown, ...], tuple[Unknown, ...]]:
    settled: list[Unknown] = []
    changed: list[Unknown] = []
    accepted = repeat is Standing.ACCEPTED_NOT_TOLD
    for one in unknowns:
        ref = LedgerRef(tenant, run, one.leg, one.shard)
        if one.held is None:
            done = one.standing is repeat
        else:
            done = ledger_upkeep.settle_by_hand(redis, ref, one.ordinal, one.held, accepted)
        (settled if done else changed).append(one)
    return tuple(settled), tuple(changed)


def _groups(members: Sequence[Unknown]) -> tuple[OutcomeGroup, ...]:
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for one in members:
        groups[one.provider, one.generation].append(one.ordinal % PAGE_SIZE)
    return tuple(
        OutcomeGroup(
            Outcome.ACCEPTED,
            Reason.SETTLED_BY_HAND,
            provider,
            generation,
            tuple(sorted(indexes)),
        )
        for (provider, generation), indexes in sorted(groups.items())
    )


def _bitmap(members: Sequence[Unknown]) -> bytes:
    return bitmap_bytes(bitmap_of(one.ordinal % PAGE_SIZE for one in members))


def _identity(one: Unknown) -> str:
    return f"{one.leg}.{one.shard}.{one.ordinal}.{one.generation}"


def _named(members: Sequence[Unknown], shown: int = 20) -> str:
    names = ", ".join(f"{one.leg} {one.shard}.{one.ordinal}" for one in members[:shown])
    more = f" and {len(members) - shown:,} more" if len(members) > shown else ""
    return f"{len(members):,} messages: {names}{more}"


def chosen(unknowns: Sequence[Unknown], recipients: Sequence[str]) -> list[Unknown]:
    """Those of these recipients; all where none is named.

    Raises:
        Missing: a recipient has no unknown.
    """
    if not recipients:
        return list(unknowns)
    found = [one for one in unknowns if one.recipient in recipients]
    lacking = set(recipients) - {one.recipient for one in found}
    if lacking:
        raise Missing(
            f"no unknown outcome of {', '.join(sorted(lacking))}: see `fanfare unknowns RUN`"
        )
    return found
