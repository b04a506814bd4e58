"""The books of a run, read from ClickHouse. The rules are those of ``transforms.books``.

Nothing here relies on merges having happened. The three scans of a run's steps group by a prefix
of the sorting key, in order, so that memory does not grow with the audience; per shard the final
ordinals are held as a Roaring bitmap, and pending is what the manifest's ordinals leave over when
those are taken out: counted, not subtracted from a total.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from clickhouse_connect.driver.client import Client

from schemas.errors import Missing
from schemas.reasons import Reason
from schemas.tables import (
    DEAD_LETTERS,
    ENGAGEMENT,
    EXCLUSIVE_KINDS,
    FINAL_KINDS,
    INGEST_PROGRESS,
    RANK_BITS,
    RUN_EVENTS,
    RUN_SHARDS,
    STEPS,
    StepKind,
)
from sinks.clickhouse import asking
from sinks.warehouse import JOB
from transforms.books import Conflict, Coordinator, Counts, Lag, Verdict, check, comparable

# The highest weight decides: accepted anywhere, unknown anywhere, else generation, kind, rank;
# as in transforms.books.class_of. 2 + 14 + 4 + 44 bits. The rank is also what merges go by, so
# that a merge changes no answer.
_WEIGHT = f"""
    bitShiftLeft(toUInt64(multiIf(kind = {StepKind.ACCEPTED.value}, 2,
                                  kind = {StepKind.UNKNOWN.value}, 1, 0)), 62)
    + bitShiftLeft(toUInt64(generation), 48)
    + bitShiftLeft(toUInt64(toUInt8(kind)), {RANK_BITS})
    + rank"""

_OF_RUN = "tenant = {tenant:String} AND run = {run:String}"
_FINAL = ", ".join(str(kind.value) for kind in sorted(FINAL_KINDS))
_EXCLUSIVE = ", ".join(str(kind.value) for kind in sorted(EXCLUSIVE_KINDS))
_IN_ORDER = {"optimize_aggregation_in_order": 1}

_CLASSES = f"""
SELECT leg, shard, classes, bitmapAndnotCardinality(
    bitmapBuild(range(toUInt32(recipients))), finals) AS pending
FROM (
    SELECT leg, shard, recipients FROM {RUN_SHARDS.name} FINAL
    ARRAY JOIN {{legs:Array(String)}} AS leg WHERE {_OF_RUN}
) AS manifest
FULL JOIN (
    SELECT leg, shard, groupArray((class, why, people)) AS classes,
        groupBitmapMergeState(ordinals) AS finals
    FROM (
        SELECT leg, shard, class, why, count() AS people, groupBitmapState(ordinal) AS ordinals
        FROM (
            SELECT leg, shard, ordinal, argMax(toUInt8(kind), {_WEIGHT}) AS class,
                argMax(reason, {_WEIGHT}) AS why
            FROM {STEPS.name} WHERE {_OF_RUN}
            GROUP BY tenant, run, leg, shard, ordinal
        )
        WHERE class IN ({_FINAL})
        GROUP BY leg, shard, class, why
    )
    GROUP BY leg, shard
) AS counted USING (leg, shard)"""  # noqa: S608

_CONFLICTS = f"""
SELECT leg, shard, ordinal, generation,
    groupBitOr(bitShiftLeft(toUInt16(1), toUInt8(kind))) AS kinds, count() OVER () AS found
FROM {STEPS.name}
WHERE {_OF_RUN} AND kind IN ({_EXCLUSIVE}) AND reason != '{Reason.LEDGER_ACCEPTED.value}'
GROUP BY tenant, run, leg, shard, ordinal, generation
HAVING bitCount(kinds) > 1
ORDER BY leg, shard, ordinal, generation LIMIT 10"""  # noqa: S608

_STRANGERS = f"""
SELECT count() FROM (
    SELECT 1 FROM {STEPS.name}
    WHERE {_OF_RUN} AND (NOT has({{legs:Array(String)}}, leg)
        OR ordinal >= arrayElement({{counts:Array(UInt32)}}, shard + 1))
    GROUP BY tenant, run, leg, shard, ordinal
)"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Books:
    """The books of one run at one moment. Units: messages owed, recipients times legs."""

    tenant: str
    run: str
    campaign: str
    status: str
    snapshot: str
    legs: tuple[str, ...]
    counts: Counts
    delivered: int
    """Distinct messages that the provider said it delivered."""
    engagement: Mapping[str, int]
    """Distinct messages by kind of event."""
    dead_letters: Mapping[str, int]
    """Dead letters that name the run, by reason."""
    coordinator: Coordinator | None
    lag: Lag
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """The books for programs: stable names, ISO times, counts."""
        counts, lag, coordinator = self.counts, self.lag, self.coordinator
        return {
            "tenant": self.tenant,
            "run": self.run,
            "campaign": self.campaign,
            "status": self.status,
            "snapshot": self.snapshot,
            "legs": list(self.legs),
            "audience": counts.audience,
            "accepted": counts.of(StepKind.ACCEPTED),
            "skipped": counts.reasons(StepKind.SKIPPED),
            "skipped_total": counts.of(StepKind.SKIPPED),
            "failed": counts.of(StepKind.FAILED),
            "failed_by_reason": counts.reasons(StepKind.FAILED),
            "expired": counts.of(StepKind.EXPIRED),
            "cancelled": counts.of(StepKind.CANCELLED),
            "unknown": counts.of(StepKind.UNKNOWN),
            "pending": counts.pending,
            "delivered": self.delivered,
            "engagement": dict(self.engagement),
            "dead_letters": dict(self.dead_letters),
            "coordinator": None
            if coordinator is None
            else {"pending": coordinator.pending, "at": coordinator.at.isoformat()},
            "lag": {
                "newest": lag.newest and lag.newest.isoformat(),
                "age_seconds": None if lag.age is None else round(lag.age.total_seconds(), 3),
                "buffered": lag.buffered,
                "behind": lag.behind,
                "caught_up": lag.caught_up,
            },
            "balanced": self.verdict.balanced,
            "errors": list(self.verdict.errors),
        }


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the run's own events say: the newest one, and the launch's legs and manifest."""

    campaign: str
    snapshot: str
    legs: tuple[str, ...]
    shard_counts: tuple[int, ...]
    coordinator: Coordinator


def utc(moment: datetime) -> datetime:
    """A moment as ClickHouse's clients give it (naive means UTC), aware."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


_FACTS = ("campaign", "snapshot", "legs", "status", "at", "pending", "audience", "open")


def run_facts(client: Client, tenant: str, run: str) -> RunFacts:
    """What is known of a run.

    Raises:
        Missing: ClickHouse has no event of it; the message names runs that it has.
        Unavailable, Refused: as ``sinks.clickhouse.asking``.
    """
    parameters = {"tenant": tenant, "run": run}
    rows = asking(
        client,
        f"SELECT {', '.join(_FACTS)} FROM {RUN_EVENTS.name} "  # noqa: S608
        # What names no campaign is in the audit trail, but no word of the run's coordinator.
        f"WHERE {_OF_RUN} AND campaign != '' ORDER BY at DESC, version DESC, event_id DESC",
        parameters,
    ).result_rows
    if not rows:
        known = asking(
            client,
            f"SELECT run FROM {RUN_EVENTS.name} WHERE tenant = {{tenant:String}} "  # noqa: S608
            "GROUP BY run ORDER BY max(at) DESC LIMIT 5",
            {"tenant": tenant},
        ).result_rows
        shown = ", ".join(row[0] for row in known) or "none yet"
        raise Missing(f"no run {run!r} of tenant {tenant!r} in ClickHouse; the newest are: {shown}")
    campaign, _, _, status, at, pending, audience, opened = rows[0]
    counts = dict(
        asking(
            client,
            f"SELECT shard, recipients FROM {RUN_SHARDS.name} FINAL WHERE {_OF_RUN}",  # noqa: S608
            parameters,
        ).result_rows
    )
    return RunFacts(
        campaign=campaign,
        snapshot=next((row[1] for row in rows if row[1]), ""),
        legs=tuple(next((row[2] for row in rows if row[2]), ())),
        shard_counts=tuple(counts.get(shard, 0) for shard in range(256)),
        coordinator=Coordinator(status, utc(at), int(pending), int(audience), int(opened)),
    )


def count(client: Client, tenant: str, run: str, facts: RunFacts) -> Counts:
    """Count the classes, pending and what contradicts, over every row of the run."""
    parameters = {
        "tenant": tenant,
        "run": run,
        "legs": list(facts.legs),
        "counts": list(facts.shard_counts),
    }
    classes: Counter[tuple[str, str]] = Counter()
    pending = 0
    for _, _, found, open_ordinals in asking(client, _CLASSES, parameters, **_IN_ORDER).result_rows:
        pending += int(open_ordinals)
        for kind, reason, recipients in found:
            classes[StepKind(int(kind)).name.lower(), str(reason)] += int(recipients)
    conflicts = asking(client, _CONFLICTS, parameters, **_IN_ORDER).result_rows
    strangers = asking(client, _STRANGERS, parameters, **_IN_ORDER).result_rows
    return Counts(
        audience=len(facts.legs) * sum(facts.shard_counts),
        classes=dict(classes),
        pending=pending,
        strangers=int(strangers[0][0]),
        conflicts=int(conflicts[0][5]) if conflicts else 0,
        conflict_examples=tuple(
            Conflict(leg, int(shard), int(ordinal), int(generation), _names(int(kinds)))
            for leg, shard, ordinal, generation, kinds, _ in conflicts
        ),
    )


def _names(kinds: int) -> tuple[str, ...]:
    return tuple(sorted(kind.name.lower() for kind in StepKind if kinds >> kind.value & 1))


def _engagement(client: Client, parameters: Mapping[str, str]) -> dict[str, int]:
    rows = asking(
        client,
        f"SELECT kind, uniqExact(send_id) FROM {ENGAGEMENT.name} WHERE {_OF_RUN} "  # noqa: S608
        "GROUP BY kind ORDER BY kind",
        dict(parameters),
    ).result_rows
    return {str(kind): int(messages) for kind, messages in rows}


def _dead_letters(client: Client, parameters: Mapping[str, str]) -> dict[str, int]:
    rows = asking(
        client,
        f"SELECT reason, uniqExact(letter_id) FROM {DEAD_LETTERS.name} WHERE {_OF_RUN} "  # noqa: S608
        "GROUP BY reason ORDER BY reason",
        dict(parameters),
    ).result_rows
    return {str(reason): int(letters) for reason, letters in rows}


def lag(client: Client, now: datetime, behind: int | None) -> Lag:
    """How far ClickHouse is behind; ``behind`` is what was found in Kafka, if one looked."""
    rows = asking(
        client,
        f"SELECT max(newest), sum(buffered), count() FROM {INGEST_PROGRESS.name} FINAL "  # noqa: S608
        f"WHERE job = '{JOB}'",
        {},
    ).result_rows
    newest, buffered, found = rows[0]
    if not found:
        return Lag(None, None, 0, behind)
    moment = utc(newest)
    return Lag(moment, now - moment, int(buffered), behind)


def read_books(
    client: Client, tenant: str, run: str, now: datetime, behind: int | None = None
) -> Books:
    """Read, count and check the books of a run.

    Args:
        client: from ``sinks.clickhouse.connect``.
        tenant: whose run.
        run: which.
        now: for the lag.
        behind: records that Kafka holds and ingestion has not taken in, None if not looked at.

    Raises:
        Missing: no such run.
        Unavailable, Refused: ClickHouse.
    """
    facts = run_facts(client, tenant, run)
    counts = count(client, tenant, run, facts)
    parameters = {"tenant": tenant, "run": run}
    newest_row = asking(
        client,
        f"SELECT max(at) FROM {STEPS.name} WHERE {_OF_RUN}",  # noqa: S608
        parameters,
    ).result_rows[0][0]
    found_lag = lag(client, now, behind)
    must_agree = comparable(facts.coordinator, utc(newest_row), found_lag.caught_up)
    engagement = _engagement(client, parameters)
    return Books(
        tenant=tenant,
        run=run,
        campaign=facts.campaign,
        status=facts.coordinator.status,
        snapshot=facts.snapshot,
        legs=facts.legs,
        counts=counts,
        delivered=engagement.get("delivered", 0),
        engagement=engagement,
        dead_letters=_dead_letters(client, parameters),
        coordinator=facts.coordinator,
        lag=found_lag,
        verdict=check(counts, facts.coordinator, must_agree),
    )
