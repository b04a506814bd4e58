"""ClickHouse: connecting, the tables, and batches of records as columns.

Everything here may be written again: a batch that failed half-way is written whole once more, and
the tables (``schemas.tables``) make it count once. Inserts are synchronous and return when the
server has the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError

from schemas.codec import to_millis
from schemas.errors import FanfareError, InvalidInput, MalformedRecord, Unavailable
from schemas.pages import PAGE_SIZE, SHARDS, bitmap_from, indexes_of
from schemas.reasons import Outcome
from schemas.records import DeadLetter, EngagementEvent, Outcomes, PageResult, RunEvent
from schemas.tables import (
    DEAD_LETTERS,
    ENGAGEMENT,
    INGEST_PROGRESS,
    MAX_GENERATION,
    RUN_EVENTS,
    RUN_SHARDS,
    SCHEMA_VERSIONS,
    STEPS,
    TABLES,
    VERSION,
    VIEWS,
    StepKind,
    Table,
    step_rank,
)
from transforms.webhooks import parse_ref

_INSERT_SETTINGS = {"async_insert": 0, "max_partitions_per_insert_block": 0}

# Codes after which the same insert may succeed: timeouts, too many queries, memory, disk, parts,
# read-only and shutting-down servers (ClickHouse, src/Common/ErrorCodes.cpp).
_PASSING_CODES = frozenset(
    {3, 159, 160, 164, 198, 202, 203, 209, 210, 236, 241, 242, 243, 252, 999}
)

_KIND_OF_OUTCOME = {
    Outcome.ACCEPTED: StepKind.ACCEPTED,
    Outcome.UNKNOWN: StepKind.UNKNOWN,
    Outcome.FAILED: StepKind.FAILED,
    Outcome.EXPIRED: StepKind.EXPIRED,
    Outcome.CANCELLED: StepKind.CANCELLED,
    Outcome.STALE: StepKind.STALE,
}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = datetime(2261, 1, 1, tzinfo=UTC)
"""DateTime64 in nanoseconds, which ClickHouse uses inside some functions, ends in 2262."""
_MAX_UINT32 = (1 << 32) - 1


class Refused(FanfareError):
    """ClickHouse understood and refused: the same statement will be refused again."""


def connect(url: str, timeout: timedelta = timedelta(seconds=10)) -> Client:
    """A client of ``http[s]://user:password@host:port[/database]``, safe to share by threads.

    Raises:
        InvalidInput: the URL is no such thing.
        Unavailable: nobody answers there.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(
            "the ClickHouse URL must read http[s]://user:password@host:port[/database]"
        )
    try:
        return clickhouse_connect.get_client(
            interface=parts.scheme,
            host=parts.hostname,
            port=parts.port or (8443 if parts.scheme == "https" else 8123),
            username=unquote(parts.username or "default"),
            password=unquote(parts.password or ""),
            database=parts.path.strip("/") or "default",
            connect_timeout=5,
            send_receive_timeout=int(timeout.total_seconds()),
            autogenerate_session_id=False,
            query_retries=0,
        )
    except (ClickHouseError, OSError) as error:
        raise _classified(error, f"connecting to {parts.hostname}:{parts.port}") from error


def _classified(error: Exception, doing: str) -> FanfareError:
    code = getattr(error, "code", None)
    text = str(error).strip().split("\n")[0][:500]
    if isinstance(error, DatabaseError) and code is not None and code not in _PASSING_CODES:
        return Refused(f"ClickHouse refused while {doing}: {text}")
    return Unavailable(f"ClickHouse did not answer while {doing}: {text}; it is tried again")


def asking(client: Client, query: str, parameters: dict[str, Any], **settings: Any) -> Any:
    """Run a query; its result. Raises Unavailable or Refused."""
    try:
        return client.query(query, parameters=parameters, settings=settings)
    except (ClickHouseError, OSError) as error:
        raise _classified(error, "reading") from error


def create_tables(client: Client) -> None:
    """Create what is missing. May be run by many processes, any number of times.

    Raises:
        Refused: the database was made by a newer Fanfare than this one.
        Unavailable: try again.
    """
    try:
        client.command(SCHEMA_VERSIONS.ddl())
        rows = client.query(f"SELECT max(version) FROM {SCHEMA_VERSIONS.name}").result_rows  # noqa: S608
        found = int(rows[0][0] or 0)
        if found > VERSION:
            raise Refused(
                f"the tables in {client.database} have version {found}, this program knows "
                f"{VERSION}: upgrade it before it writes there"
            )
        for table in TABLES:
            client.command(table.ddl())
        for view in VIEWS:
            client.command(view)
        if found < VERSION:
            client.insert(SCHEMA_VERSIONS.name, [[VERSION]], column_names=["version"])
    except (ClickHouseError, OSError) as error:
        raise _classified(error, "creating tables") from error


def _arrow_type(kind: str) -> pa.DataType:
    if kind.startswith("LowCardinality("):
        kind = kind.removeprefix("LowCardinality(").removesuffix(")")
    if kind.startswith("Enum8("):
        return pa.int8()
    if kind.startswith("DateTime64(3"):
        return pa.timestamp("ms", tz="UTC")
    if kind.startswith("Array("):
        return pa.list_(_arrow_type(kind.removeprefix("Array(").removesuffix(")")))
    return {
        "String": pa.string(),
        "Bool": pa.bool_(),
        "UInt8": pa.uint8(),
        "UInt16": pa.uint16(),
        "UInt32": pa.uint32(),
        "UInt64": pa.uint64(),
        "Int16": pa.int16(),
        "Int64": pa.int64(),
    }[kind]


class _Columns:
    """Rows of one table, gathered by column."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.values: dict[str, list[Any]] = {name: [] for name, _ in table.columns}

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def add(self, **row: Any) -> None:
        for name, column in self.values.items():
            column.append(row[name])

    def arrow(self) -> pa.Table:
        return pa.table(
            {
                name: pa.array(self.values[name], type=_arrow_type(kind))
                for name, kind in self.table.columns
            }
        )


def _checked_time(moment: datetime, what: str) -> int:
    if not _EPOCH <= moment < _LAST:
        raise MalformedRecord(f"{what} is {moment.isoformat()}, expected 1970 to 2260")
    return to_millis(moment)


def _checked_place(shard: int, page: int, generations: Sequence[int]) -> None:
    if not 0 <= shard < SHARDS:
        raise MalformedRecord(f"shard is {shard}, expected 0 to {SHARDS - 1}")
    if not 0 <= page <= _MAX_UINT32 // PAGE_SIZE - 1:
        raise MalformedRecord(f"page is {page}, which no snapshot has")
    for generation in generations:
        if not 0 <= generation <= MAX_GENERATION:
            raise MalformedRecord(f"generation is {generation}, expected 0 to {MAX_GENERATION}")


class Batch:
    """Records on their way into ClickHouse, as columns.

    ``add_*`` raises MalformedRecord, and adds nothing, for values that no table can hold; the rest
    of the batch is not harmed. ``write`` may be called again after it failed.
    """

    def __init__(self) -> None:
        self._steps = _Columns(STEPS)
        self._runs = _Columns(RUN_EVENTS)
        self._shards = _Columns(RUN_SHARDS)
        self._engagement = _Columns(ENGAGEMENT)
        self._letters = _Columns(DEAD_LETTERS)

    @property
    def rows(self) -> int:
        """Rows gathered so far."""
        return sum(
            map(len, (self._steps, self._runs, self._shards, self._engagement, self._letters))
        )

    def add_page_result(self, result: PageResult) -> None:
        """A row for each recipient that the result names."""
        _checked_place(result.shard, result.page, (result.generation,))
        at = _checked_time(result.decided_at, "decided_at")
        groups: list[tuple[StepKind, str, int, list[int]]] = [
            (StepKind.SEND, "", 0, _page_indexes(result.sends))
        ]
        for skip in result.skips:
            kind = StepKind.EXPIRED if skip.expired else StepKind.SKIPPED
            groups.append((kind, skip.reason.value, 0, _page_indexes(skip.ordinals)))
        for deferral in result.deferrals:
            until = _checked_time(deferral.until, "until")
            indexes = _page_indexes(deferral.ordinals)
            groups.append((StepKind.DEFER, deferral.reason.value, until, indexes))
        for kind, reason, until, indexes in groups:
            self._add_steps(
                result, indexes, result.generation, kind, reason, at, until, "", (), 0, ""
            )

    def add_outcomes(self, outcomes: Outcomes) -> None:
        """A row for each recipient that the outcomes name."""
        _checked_place(outcomes.shard, outcomes.page, [one.generation for one in outcomes.groups])
        at = _checked_time(outcomes.at, "at")
        for group in outcomes.groups:
            if any(not 0 <= index < PAGE_SIZE for index in group.indexes):
                raise MalformedRecord(f"an index is not within a page of {PAGE_SIZE}")
            if group.provider_ids and len(group.provider_ids) != len(group.indexes):
                raise MalformedRecord(
                    f"{len(group.provider_ids)} provider ids for {len(group.indexes)} recipients"
                )
        for group in outcomes.groups:
            self._add_steps(
                outcomes,
                list(group.indexes),
                group.generation,
                _KIND_OF_OUTCOME[group.outcome],
                group.reason.value,
                at,
                0,
                group.provider,
                group.provider_ids,
                min(max(group.attempts, 0), 65_535),
                group.detail,
            )

    def _add_steps(
        self,
        record: PageResult | Outcomes,
        indexes: list[int],
        generation: int,
        kind: StepKind,
        reason: str,
        at_ms: int,
        until_ms: int,
        provider: str,
        provider_ids: Sequence[str],
        attempts: int,
        detail: str,
    ) -> None:
        n = len(indexes)
        first = record.page * PAGE_SIZE
        columns = self._steps.values
        columns["tenant"] += [record.tenant] * n
        columns["run"] += [record.run] * n
        columns["leg"] += [record.leg] * n
        columns["shard"] += [record.shard] * n
        columns["ordinal"] += [first + index for index in indexes]
        columns["generation"] += [generation] * n
        columns["kind"] += [kind.value] * n
        columns["reason"] += [reason] * n
        columns["at"] += [at_ms] * n
        columns["until"] += [until_ms] * n
        columns["provider"] += [provider] * n
        columns["provider_id"] += provider_ids or [""] * n
        columns["attempts"] += [attempts] * n
        columns["detail"] += [detail] * n
        if provider_ids:
            columns["rank"] += [step_rank(one, at_ms, reason) for one in provider_ids]
        else:
            columns["rank"] += [step_rank("", at_ms, reason)] * n

    def add_run_event(self, event: RunEvent) -> None:
        """A row of the audit trail; at launch also the manifest's shards."""
        at = _checked_time(event.at, "at")
        counts = (event.audience, event.pending, event.ordered, event.open, event.deferred)
        if min(counts) < 0 or event.version < 0:
            raise MalformedRecord("a run event counts less than nothing")
        if len(event.shard_counts) > SHARDS or any(
            not 0 <= one <= _MAX_UINT32 for one in event.shard_counts
        ):
            raise MalformedRecord(f"shard_counts must be at most {SHARDS} counts")
        self._runs.add(
            tenant=event.tenant,
            run=event.run,
            event_id=event.event_id,
            campaign=event.campaign,
            version=event.version,
            status=event.status.value,
            at=at,
            command_id=event.command_id,
            command="" if event.command is None else event.command.value,
            issued_by=event.by,
            accepted=event.accepted,
            note=event.note,
            spec=event.spec or "",
            snapshot=event.snapshot or "",
            audience=event.audience,
            legs=list(event.legs),
            pending=event.pending,
            ordered=event.ordered,
            open=event.open,
            deferred=event.deferred,
        )
        for shard, recipients in enumerate(event.shard_counts):
            self._shards.add(
                tenant=event.tenant,
                run=event.run,
                shard=shard,
                snapshot=event.snapshot or "",
                recipients=recipients,
            )

    def add_engagement(self, event: EngagementEvent) -> None:
        """A row of what a provider said."""
        at = _checked_time(event.at, "at")
        shard, ordinal, _ = parse_ref(event.ref) or (-1, -1, -1)
        self._engagement.add(
            tenant=event.tenant,
            run=event.run,
            kind=event.kind.value,
            event_id=event.event_id,
            leg=event.leg,
            send_id=event.send_id,
            ref=event.ref,
            shard=shard,
            ordinal=ordinal,
            at=at,
            provider=event.provider,
            provider_id=event.provider_message_id,
            reason=event.reason,
            url=event.url,
        )

    def add_dead_letter(self, letter: DeadLetter) -> None:
        """A row of the index of dead letters; their bytes stay in the topic."""
        if not -1 <= letter.shard < SHARDS or not -1 <= letter.page < 1 << 32:
            raise MalformedRecord(f"shard {letter.shard}, page {letter.page} can't be")
        first = max(letter.page, 0) * PAGE_SIZE
        self._letters.add(
            tenant=letter.tenant,
            letter_id=letter.letter_id,
            run=letter.run,
            leg=letter.leg,
            step=letter.step,
            reason=letter.reason.value,
            detail=letter.detail,
            source=letter.source,
            first_at=_checked_time(letter.first_at, "first_at"),
            last_at=_checked_time(letter.last_at, "last_at"),
            shard=letter.shard,
            page=letter.page,
            generation=letter.generation,
            ordinals=[first + index for index in _page_indexes(letter.ordinals)],
            bytes=len(letter.original),
        )

    def write(self, client: Client) -> int:
        """Insert everything; how many rows. Idempotent: may be repeated after any failure.

        Raises:
            Unavailable: some or all is not written; write again later.
            Refused: the server does not take it; somebody must look.
        """
        # A run's shards go before its events: who sees the run can count its audience.
        for columns in (self._steps, self._shards, self._runs, self._engagement, self._letters):
            if len(columns):
                insert(client, columns.table, columns.arrow())
        return self.rows


def insert(client: Client, table: Table, rows: pa.Table) -> None:
    """Insert Arrow columns synchronously. Raises Unavailable or Refused."""
    try:
        client.insert_arrow(table.name, rows, settings=_INSERT_SETTINGS)
    except (ClickHouseError, OSError) as error:
        raise _classified(error, f"inserting {rows.num_rows} rows into {table.name}") from error


def write_progress(
    client: Client,
    job: str,
    writer: int,
    newest: dict[str, datetime],
    records: dict[str, int],
    buffered: int,
    now: datetime,
) -> None:
    """Say how far ingestion is, by record name. Raises Unavailable or Refused."""
    columns = _Columns(INGEST_PROGRESS)
    for record, moment in newest.items():
        columns.add(
            job=job,
            writer=writer,
            record=record,
            newest=to_millis(moment),
            written_at=to_millis(now),
            records=records.get(record, 0),
            buffered=buffered,
        )
    insert(client, INGEST_PROGRESS, columns.arrow())


def _page_indexes(bitmap: bytes) -> list[int]:
    bits = bitmap_from(bitmap)
    if bits.bit_length() > PAGE_SIZE:
        raise MalformedRecord(f"a bitmap has {bits.bit_length()} bits, a page {PAGE_SIZE}")
    return indexes_of(bits)
