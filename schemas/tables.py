"""The tables of ClickHouse: what the books, the reports and a person's story are read from.

All is written at least once, so every table is a ReplacingMergeTree whose sorting and partition
keys are functions of the event alone (facts of ClickHouse: a duplicate in another partition never
merges). Which of two rows with one key survives is decided by ``rank``, again a function of the
row's content: the order of arrival changes nothing. Queries do not rely on merges having happened:
they aggregate by key with functions that ignore duplicates, or say ``FINAL``.

Nobody's address is in any of them; the recipient is named by shard and ordinal.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import IntEnum

VERSION = 1
"""Raised with every change of the tables; ``create_tables`` refuses a newer one than its own."""


class StepKind(IntEnum):
    """What a row of ``steps`` says of one recipient in one generation.

    The number is the row's weight within its generation (the heaviest decides the class) and its
    value in ClickHouse's Enum8: numbers are permanent.
    """

    SEND = 1
    """Decided; delivery owes an outcome."""
    DEFER = 2
    """To be decided again at ``until``."""
    STALE = 3
    """Delivery gave the decision back: to be decided again."""
    CANCELLED = 4
    EXPIRED = 5
    SKIPPED = 6
    FAILED = 7
    UNKNOWN = 8
    ACCEPTED = 9


FINAL_KINDS = frozenset(
    {
        StepKind.CANCELLED,
        StepKind.EXPIRED,
        StepKind.SKIPPED,
        StepKind.FAILED,
        StepKind.UNKNOWN,
        StepKind.ACCEPTED,
    }
)
"""A recipient whose class is one of these is not pending."""

EXCLUSIVE_KINDS = frozenset(FINAL_KINDS - {StepKind.UNKNOWN})
"""Two of these in one generation contradict each other; an unknown may become any of them."""

_KIND_ENUM = ", ".join(f"'{kind.name.lower()}' = {kind.value}" for kind in StepKind)

MAX_GENERATION = (1 << 14) - 1
"""More orders of one page are refused as malformed; at one every ten minutes it is 113 days."""
RANK_BITS = 44
_RANK_SECONDS = (1 << 31) - 1
_RANK_EPOCH_S = 1_577_836_800
"""2020-01-01."""


def step_rank(provider_id: str, at_ms: int, reason: str) -> int:
    """Which of two rows with one key is kept: the higher.

    A known provider id outranks an absent one, then the earlier second wins, then the content: a
    function of the row alone, so that the order of arrival does not matter. Fits ``RANK_BITS``.
    """
    known = 1 << RANK_BITS - 1 if provider_id else 0
    age = min(max(at_ms // 1000 - _RANK_EPOCH_S, 0), _RANK_SECONDS)
    content = zlib.crc32(f"{provider_id}\x1f{reason}".encode()) >> 20
    return known | _RANK_SECONDS - age << 12 | content


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its name, columns in order as (name, ClickHouse type), and what follows them."""

    name: str
    columns: tuple[tuple[str, str], ...]
    engine: str
    what: str

    def ddl(self) -> str:
        """The statement that creates it where it does not exist."""
        columns = ",\n".join(f"    {name} {kind}" for name, kind in self.columns)
        return f"CREATE TABLE IF NOT EXISTS {self.name} (\n{columns}\n)\n{self.engine}"


_TENANT = ("tenant", "LowCardinality(String)")
_LEG = ("leg", "LowCardinality(String)")
_TIME = "DateTime64(3, 'UTC')"

SCHEMA_VERSIONS = Table(
    "fanfare_schema",
    (("version", "UInt32"), ("applied_at", "DateTime64(3, 'UTC') DEFAULT now64(3)")),
    "ENGINE = ReplacingMergeTree(applied_at) ORDER BY version",
    "Versions of these tables that this database has seen.",
)

STEPS = Table(
    "fanfare_steps",
    (
        _TENANT,
        ("run", "String"),
        _LEG,
        ("shard", "UInt8"),
        ("ordinal", "UInt32"),
        ("generation", "UInt32"),
        ("kind", f"Enum8({_KIND_ENUM})"),
        ("reason", "LowCardinality(String)"),
        ("at", _TIME),
        ("until", _TIME),
        ("provider", "LowCardinality(String)"),
        ("provider_id", "String"),
        ("attempts", "UInt16"),
        ("detail", "String"),
        ("rank", "UInt64"),
    ),
    "ENGINE = ReplacingMergeTree(rank)\n"
    "ORDER BY (tenant, run, leg, shard, ordinal, generation, kind)",
    "One row a recipient, generation and kind: decisions and outcomes. `until` is only for defer "
    "(1970 otherwise); `generation` counts the orders of the recipient's page.",
)

RUN_EVENTS = Table(
    "fanfare_run_events",
    (
        _TENANT,
        ("run", "String"),
        ("event_id", "String"),
        ("campaign", "String"),
        ("version", "UInt64"),
        ("status", "LowCardinality(String)"),
        ("at", _TIME),
        ("command_id", "String"),
        ("command", "LowCardinality(String)"),
        ("issued_by", "String"),
        ("accepted", "Bool"),
        ("note", "String"),
        ("spec", "String"),
        ("snapshot", "String"),
        ("audience", "UInt64"),
        ("legs", "Array(String)"),
        ("pending", "UInt64"),
        ("ordered", "UInt64"),
        ("open", "UInt64"),
        ("deferred", "UInt64"),
    ),
    "ENGINE = ReplacingMergeTree\nORDER BY (tenant, run, event_id)",
    "The audit trail of runs, with the coordinator's own counts at each change.",
)

RUN_SHARDS = Table(
    "fanfare_run_shards",
    (
        _TENANT,
        ("run", "String"),
        ("shard", "UInt8"),
        ("snapshot", "String"),
        ("recipients", "UInt32"),
    ),
    "ENGINE = ReplacingMergeTree\nORDER BY (tenant, run, shard)",
    "How many recipients the run's manifest has in each shard: ordinals 0 to recipients - 1.",
)

ENGAGEMENT = Table(
    "fanfare_engagement",
    (
        _TENANT,
        ("run", "String"),
        ("kind", "LowCardinality(String)"),
        ("event_id", "String"),
        _LEG,
        ("send_id", "String"),
        ("ref", "String"),
        ("shard", "Int16"),
        ("ordinal", "Int64"),
        ("at", _TIME),
        ("provider", "LowCardinality(String)"),
        ("provider_id", "String"),
        ("reason", "String"),
        ("url", "String"),
    ),
    "ENGINE = ReplacingMergeTree\nPARTITION BY toYYYYMM(at)\n"
    "ORDER BY (tenant, run, kind, event_id)",
    "What providers said of messages. `shard` and `ordinal` are -1 where the reference is absent.",
)

ENGAGEMENT_HOURLY = Table(
    "fanfare_engagement_hourly",
    (
        _TENANT,
        ("run", "String"),
        _LEG,
        ("hour", "DateTime('UTC')"),
        ("kind", "LowCardinality(String)"),
        ("events", "AggregateFunction(uniqExact, String)"),
        ("messages", "AggregateFunction(uniqExact, String)"),
    ),
    "ENGINE = AggregatingMergeTree\nORDER BY (tenant, run, leg, hour, kind)",
    "Distinct event ids and distinct messages by hour: read with uniqExactMerge, so that "
    "duplicates count once.",
)

DEAD_LETTERS = Table(
    "fanfare_dead_letters",
    (
        ("tenant", "LowCardinality(String)"),
        ("letter_id", "String"),
        ("run", "String"),
        _LEG,
        ("step", "LowCardinality(String)"),
        ("reason", "LowCardinality(String)"),
        ("detail", "String"),
        ("source", "LowCardinality(String)"),
        ("first_at", _TIME),
        ("last_at", _TIME),
        ("shard", "Int16"),
        ("page", "Int64"),
        ("generation", "Int64"),
        ("ordinals", "Array(UInt32)"),
        ("bytes", "UInt64"),
    ),
    "ENGINE = ReplacingMergeTree\nORDER BY (tenant, letter_id)",
    "Index of the dead-letter topic; the bytes themselves stay in the topic. `ordinals` are of the "
    "shard.",
)

INGEST_PROGRESS = Table(
    "fanfare_ingest_progress",
    (
        ("job", "LowCardinality(String)"),
        ("writer", "UInt32"),
        ("record", "LowCardinality(String)"),
        ("newest", _TIME),
        ("written_at", _TIME),
        ("records", "UInt64"),
        ("buffered", "UInt64"),
    ),
    "ENGINE = ReplacingMergeTree(written_at)\nORDER BY (job, writer, record)",
    "How far ingestion is: the newest record of each kind written, when, and how many records "
    "were still buffered.",
)

TABLES: tuple[Table, ...] = (
    SCHEMA_VERSIONS,
    STEPS,
    RUN_EVENTS,
    RUN_SHARDS,
    ENGAGEMENT,
    ENGAGEMENT_HOURLY,
    DEAD_LETTERS,
    INGEST_PROGRESS,
)

VIEWS: tuple[str, ...] = (
    f"""CREATE MATERIALIZED VIEW IF NOT EXISTS fanfare_engagement_to_hourly
TO {ENGAGEMENT_HOURLY.name} AS
SELECT tenant, run, leg, toStartOfHour(at) AS hour, kind,
    uniqExactState(event_id) AS events, uniqExactState(send_id) AS messages
FROM {ENGAGEMENT.name} GROUP BY tenant, run, leg, hour, kind""",  # noqa: S608
)
