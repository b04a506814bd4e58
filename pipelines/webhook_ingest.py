"""The webhook-ingest job: what happened, into ClickHouse; what it means for consent, to Kafka.

    raw webhooks, page results, outcomes, runs, dead letters ─▶ ingest ─▶ ClickHouse
                                               consent, dead letters, outcomes ◀─┘

All of it at least once; the tables make it count once. Python has no snapshot hook, so what is
buffered is keyed state: a record is in the state until ClickHouse has acknowledged its rows, and a
checkpoint between holds it. The keys are a few integers, one for each subtask, so that batches are
large; nothing depends on which record has which key.

A message whose outcome is unknown becomes accepted when an event of it proves that the provider
took it: ``pipelines.reconcile`` watches the unknowns that pass here, and what it finds is emitted
as an outcome like delivery's.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from pyflink.common import Types
from pyflink.datastream import DataStream, KeyedProcessFunction, RuntimeContext
from pyflink.datastream.connectors.kafka import KafkaSink
from pyflink.datastream.state import MapStateDescriptor

from pipelines.dead_letters import DeadLetterGate
from pipelines.reconcile import PageStore, Reconciler, Settler
from schemas.codec import decode, encode, name_of, to_millis
from schemas.errors import (
    Corrupt,
    InvalidInput,
    InvalidWebhook,
    MalformedRecord,
    Missing,
    Unavailable,
    UnknownSchema,
)
from schemas.pages import PAGE_SIZE, SHARD_KEYS, SHARDS
from schemas.reasons import Reason
from schemas.records import (
    DeadLetter,
    EngagementEvent,
    Outcomes,
    PageResult,
    RawWebhook,
    RunEvent,
)
from transforms.reconcile import ReconcilePolicy, unknowns_of
from transforms.webhooks import SENDGRID, ConsentEffect, Parsed, parse_sendgrid

log = logging.getLogger(__name__)

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_RETRY = timedelta(milliseconds=500)
_LONGEST_RETRY = timedelta(seconds=15)
_RUN_PATIENCE = timedelta(seconds=30)
"""How long a webhook waits for its run to become known before it is a dead letter."""
_BUSY = timedelta(seconds=1)
"""A flush ends after this and is continued by a timer, so that barriers pass."""
_CROWDED = 10_000
"""Buffered records of a key from which on each further one waits ``_CROWDED_PAUSE``: Kafka keeps
what is not read, so an outage is to grow the topic's lag, not the state."""
_CROWDED_PAUSE = timedelta(milliseconds=50)


class RowBatch(Protocol):
    """Records on their way into ClickHouse; ``add_*`` raises MalformedRecord and adds nothing."""

    @property
    def rows(self) -> int:
        """Rows gathered so far."""

    def add_page_result(self, result: PageResult) -> None:
        """A row for each recipient."""

    def add_outcomes(self, outcomes: Outcomes) -> None:
        """A row for each recipient."""

    def add_run_event(self, event: RunEvent) -> None:
        """A row, and the manifest's shards at launch."""

    def add_engagement(self, event: EngagementEvent) -> None:
        """A row."""

    def add_dead_letter(self, letter: DeadLetter) -> None:
        """A row."""


class Tables(Protocol):
    """Where rows go. Every method raises Unavailable when it is to be tried again later."""

    def batch(self) -> Any:
        """An empty RowBatch."""

    def write(self, batch: Any) -> int:
        """Write a batch; how many rows. May be repeated."""

    def snapshot_of(self, tenant: str, run: str) -> str | None:
        """The snapshot of a run, None while the run is not known."""

    def progress(
        self,
        writer: int,
        newest: Mapping[str, datetime],
        records: Mapping[str, int],
        buffered: int,
        now: datetime,
    ) -> None:
        """Say how far ingestion is."""

    def close(self) -> None:
        """Let the connection go."""


@dataclass(frozen=True, slots=True)
class IngestParts:
    """What the operator is given; factories are called once where it opens."""

    tables: Callable[[], Tables]
    store: Callable[[], PageStore]
    flush_after: timedelta
    batch_rows: int
    dead_letter_ratio: float
    dead_letter_window: int
    settler: Callable[[], Settler] | None = None
    """None: no ledger can be reached, and unknowns stay held until a person settles them."""
    reconcile: ReconcilePolicy = field(default_factory=ReconcilePolicy)


@dataclass(slots=True)
class _Buffer:
    """What a key has in state: records ``head`` to ``tail``; the rest is of this process only."""

    key: int
    head: int
    tail: int
    weight: int = 0
    timer_ms: int = 0
    look_ms: int = 0
    """When the timer for unknowns is set; 0: it is not."""
    unknowns: Reconciler | None = None
    failures: int = 0
    not_before: datetime = _LONG_AGO

    @property
    def count(self) -> int:
        return self.tail - self.head


@dataclass(slots=True)
class _Taken:
    """One batch: the rows, and what else its records mean."""

    rows: RowBatch
    end: int
    good: int = 0
    consents: list[ConsentEffect] = field(default_factory=list)
    bad: list[_Bad] = field(default_factory=list)
    postponed: list[bytes] = field(default_factory=list)
    unknowns: list[Outcomes] = field(default_factory=list)
    heard: list[EngagementEvent] = field(default_factory=list)
    newest: dict[str, datetime] = field(default_factory=dict)
    records: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Bad:
    """What becomes a dead letter."""

    original: bytes
    error: Exception
    step: str
    tenant: str = ""
    run: str = ""
    reason: Reason | None = None


class IngestOperator(KeyedProcessFunction):  # type: ignore[misc]
    """Keyed by writer. In: encoded records. Out: consent changes and dead letters."""

    def __init__(self, parts: IngestParts) -> None:
        self._parts = parts

    def open(self, runtime_context: RuntimeContext) -> None:
        """Make the clients; nothing is connected yet."""
        parts = self._parts
        self._state = runtime_context.get_map_state(
            MapStateDescriptor("records", Types.LONG(), Types.PICKLED_BYTE_ARRAY())
        )
        self._unknowns = runtime_context.get_map_state(
            MapStateDescriptor("unknowns", Types.STRING(), Types.PICKLED_BYTE_ARRAY())
        )
        self._settler = parts.settler() if parts.settler is not None else None
        if self._settler is None:
            log.warning("FANFARE_REDIS is not set: webhooks settle no unknown outcomes")
        self._tables = parts.tables()
        self._store = parts.store()
        self._gate = DeadLetterGate("ingest", parts.dead_letter_ratio, parts.dead_letter_window)
        self._buffers: dict[int, _Buffer] = {}
        self._snapshots: dict[tuple[str, str], str] = {}
        self._first_seen: dict[str, datetime] = {}
        self._newest: dict[str, datetime] = {}
        self._records: Counter[str] = Counter()
        metrics = runtime_context.get_metrics_group().add_group("fanfare_ingest")
        self._metrics = {
            name: metrics.counter(name)
            for name in (
                "records", "rows", "consent_changes", "dead_letters", "foreign_events",
                "ignored_events", "write_failures", "unknowns_watched", "unknowns_settled",
            )
        }  # fmt: skip

    def close(self) -> None:
        """Let the servers go."""
        self._tables.close()
        if self._settler is not None:
            self._settler.close()

    def process_element(self, value: bytes, ctx: KeyedProcessFunction.Context) -> Iterator[bytes]:
        """Keep a record, and write when a batch is full."""
        data = bytes(value)
        buffer = self._buffer(ctx.get_current_key())
        self._keep(buffer, data)
        self._metrics["records"].inc()
        now = datetime.now(UTC)
        self._arm(buffer, ctx, now + self._parts.flush_after)
        if buffer.weight >= self._parts.batch_rows and now >= buffer.not_before:
            yield from self._flush(buffer, ctx)
        elif buffer.count > _CROWDED:
            time.sleep(_CROWDED_PAUSE.total_seconds())

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[bytes]:
        """Write what is buffered, and look after unknowns."""
        buffer = self._buffer(ctx.get_current_key())
        if buffer.timer_ms <= timestamp:
            buffer.timer_ms = 0
        if buffer.look_ms <= timestamp:
            buffer.look_ms = 0
        now = datetime.now(UTC)
        if buffer.count and now < buffer.not_before:
            self._arm(buffer, ctx, buffer.not_before)
        elif buffer.count:
            yield from self._flush(buffer, ctx)
        yield from self._look_after_unknowns(buffer, ctx)

    def _look_after_unknowns(self, buffer: _Buffer, ctx: Any) -> Iterator[bytes]:
        unknowns = buffer.unknowns
        if unknowns is None:
            return
        now = datetime.now(UTC)
        for outcomes in unknowns.look(now):
            self._metrics["unknowns_settled"].inc(sum(len(one.indexes) for one in outcomes.groups))
            yield encode(outcomes)
        soonest = unknowns.soonest
        if soonest is None:
            return
        look_ms = to_millis(max(soonest, now)) + 1
        if not buffer.look_ms or look_ms < buffer.look_ms:
            buffer.look_ms = look_ms
            ctx.timer_service().register_processing_time_timer(look_ms)

    def _buffer(self, key: int) -> _Buffer:
        buffer = self._buffers.get(key)
        if buffer is None:
            # First touch in this process: what a predecessor left is in the state.
            numbers = sorted(self._state.keys())
            buffer = _Buffer(key, numbers[0], numbers[-1] + 1) if numbers else _Buffer(key, 0, 0)
            buffer.weight = buffer.count
            if self._settler is not None:
                buffer.unknowns = Reconciler(
                    self._unknowns,
                    self._settler,
                    self._store,
                    self._parts.reconcile,
                    datetime.now(UTC),
                )
            self._buffers[key] = buffer
        return buffer

    def _keep(self, buffer: _Buffer, data: bytes) -> None:
        self._state.put(buffer.tail, data)
        buffer.tail += 1
        # A page result is short and stands for up to a page of rows.
        buffer.weight += PAGE_SIZE if name_of(data) == "PageResult" else 1 + len(data) // 40

    def _arm(self, buffer: _Buffer, ctx: Any, when: datetime) -> None:
        if not buffer.timer_ms:
            buffer.timer_ms = to_millis(when) + 1
            ctx.timer_service().register_processing_time_timer(buffer.timer_ms)

    def _flush(self, buffer: _Buffer, ctx: Any) -> Iterator[bytes]:
        end = buffer.tail
        until = time.monotonic() + _BUSY.total_seconds()
        while buffer.head < end and time.monotonic() < until:
            try:
                taken = self._take(buffer, end)
                outputs = self._write(buffer, taken)
            except Unavailable as error:
                self._back_off(buffer, error)
                break
            yield from outputs
            self._watch(buffer, taken)
            for number in range(buffer.head, taken.end):
                self._state.remove(number)
            buffer.head = taken.end
            buffer.failures = 0
            for data in taken.postponed:
                self._keep(buffer, data)
        if buffer.head == end:
            buffer.weight = buffer.count
        if buffer.count:
            pause = timedelta(0) if buffer.head < end else self._parts.flush_after
            self._arm(buffer, ctx, max(datetime.now(UTC) + pause, buffer.not_before))

    def _watch(self, buffer: _Buffer, taken: _Taken) -> None:
        """What was written may be unknowns, or prove some."""
        if buffer.unknowns is None:
            return
        now = datetime.now(UTC)
        for outcomes in taken.unknowns:
            buffer.unknowns.take(outcomes, now)
            self._metrics["unknowns_watched"].inc(sum(len(one.indexes) for one in outcomes.groups))
        if buffer.unknowns.soonest is not None:
            for event in taken.heard:
                buffer.unknowns.heard(event, now)

    def _back_off(self, buffer: _Buffer, error: Unavailable) -> None:
        wait = min(_FIRST_RETRY * 2 ** min(buffer.failures, 10), _LONGEST_RETRY)
        buffer.failures += 1
        buffer.not_before = datetime.now(UTC) + wait
        self._metrics["write_failures"].inc()
        log.warning("%s; %d records wait, next try in %s", error, buffer.count, wait)

    def _take(self, buffer: _Buffer, end: int) -> _Taken:
        taken = _Taken(self._tables.batch(), buffer.head)
        while taken.end < end and taken.rows.rows < self._parts.batch_rows:
            data = self._state.get(taken.end)
            taken.end += 1
            if data is not None:
                self._read(taken, bytes(data))
        return taken

    def _read(self, taken: _Taken, data: bytes) -> None:
        name = name_of(data) or "bytes"
        try:
            match name:
                case "PageResult":
                    result = decode(data, PageResult)
                    taken.rows.add_page_result(result)
                    at = result.decided_at
                case "Outcomes":
                    outcomes = decode(data, Outcomes)
                    taken.rows.add_outcomes(outcomes)
                    unknowns = unknowns_of(outcomes)
                    if unknowns is not None:
                        taken.unknowns.append(unknowns)
                    at = outcomes.at
                case "RunEvent":
                    event = decode(data, RunEvent)
                    taken.rows.add_run_event(event)
                    at = event.at
                case "DeadLetter":
                    letter = decode(data, DeadLetter)
                    taken.rows.add_dead_letter(letter)
                    at = letter.last_at
                case "RawWebhook":
                    webhook = decode(data, RawWebhook)
                    self._read_webhook(taken, data, webhook)
                    at = webhook.received_at
                case other:
                    raise UnknownSchema(
                        "ingest takes PageResult, Outcomes, RunEvent, RawWebhook and DeadLetter, "
                        f"got {other} beginning {data[:10].hex(' ')!r}"
                    )
        except (MalformedRecord, InvalidWebhook) as error:
            taken.bad.append(_Bad(data, error, "read"))
            return
        # Our own dead letters come back here: they are no sign of health.
        taken.good += name != "DeadLetter"
        taken.records[name] += 1
        taken.newest[name] = max(at, taken.newest.get(name, at))

    def _read_webhook(self, taken: _Taken, data: bytes, webhook: RawWebhook) -> None:
        if webhook.provider != SENDGRID:
            raise InvalidWebhook(f"no parser is known for webhooks of {webhook.provider!r}")
        parsed = parse_sendgrid(webhook)
        unreadable: list[_Bad] = []
        for event in parsed.events:
            try:
                taken.rows.add_engagement(event)
            except MalformedRecord as error:
                unreadable.append(_Bad(encode(event), error, "event", webhook.tenant, event.run))
        if self._waits_for_run(webhook, parsed):
            taken.postponed.append(data)
            return
        taken.bad += unreadable
        taken.bad += [
            _Bad(bad.original, InvalidWebhook(f"event {bad.index}: {bad.why}"), "event",
                 webhook.tenant)
            for bad in parsed.bad
        ]  # fmt: skip
        taken.good += len(parsed.events)
        taken.consents += parsed.consents
        taken.heard += parsed.events
        self._metrics["foreign_events"].inc(parsed.foreign)
        self._metrics["ignored_events"].inc(parsed.ignored)

    def _waits_for_run(self, webhook: RawWebhook, parsed: Parsed) -> bool:
        """Whether a consent effect needs a run that is not known yet, but may soon be: topics are
        read side by side, so a webhook may come before its run's launch."""
        pending = [
            effect
            for effect in parsed.consents
            if not effect.recipient_id and effect.ref and self._snapshot_of(effect) is None
        ]
        if not pending:
            self._first_seen.pop(webhook.webhook_id, None)
            return False
        now = datetime.now(UTC)
        first = self._first_seen.setdefault(webhook.webhook_id, now)
        if now - first < _RUN_PATIENCE:
            return True
        del self._first_seen[webhook.webhook_id]
        return False

    def _snapshot_of(self, effect: ConsentEffect) -> str | None:
        key = (effect.tenant, effect.run)
        known = self._snapshots.get(key)
        if known is None:
            found = self._tables.snapshot_of(*key)
            if found is not None:
                self._snapshots[key] = found
            return found
        return known

    def _write(self, buffer: _Buffer, taken: _Taken) -> list[bytes]:
        """Write a batch; what is to be emitted once it is written. Raises Unavailable."""
        now = datetime.now(UTC)
        rows = self._tables.write(taken.rows)
        outputs: list[bytes] = []
        for effect in taken.consents:
            try:
                outputs.append(encode(effect.change(self._recipient(effect))))
            except (InvalidInput, Missing, Corrupt) as error:
                reason = Reason.UNKNOWN_RUN if isinstance(error, _UnknownRun) else None
                taken.bad.append(
                    _Bad(effect.original, error, "consent", effect.tenant, effect.run, reason)
                )
        newest = {**self._newest, **taken.newest}
        left = buffer.tail - taken.end + len(taken.postponed)
        if taken.newest:
            self._tables.progress(buffer.key, newest, self._records + taken.records, left, now)
        self._newest = newest
        self._records += taken.records
        self._gate.good(taken.good)
        self._metrics["rows"].inc(rows)
        self._metrics["consent_changes"].inc(len(outputs))
        self._metrics["dead_letters"].inc(len(taken.bad))
        return outputs + [self._letter(bad, now) for bad in taken.bad]

    def _recipient(self, effect: ConsentEffect) -> str:
        """Whom a consent effect is about. Raises InvalidInput, Missing, Corrupt, Unavailable."""
        if effect.recipient_id:
            recipient = effect.recipient_id
        elif effect.ref is None:
            raise InvalidWebhook("ff_ref is no shard.ordinal.generation: whose event is it?")
        else:
            shard, ordinal, _ = effect.ref
            snapshot = self._snapshot_of(effect)
            if snapshot is None:
                raise _UnknownRun(f"no run {effect.run!r} of tenant {effect.tenant!r} is known")
            page = self._store.open_snapshot(snapshot).read_index(shard, ordinal // PAGE_SIZE)
            if ordinal % PAGE_SIZE >= len(page.recipient_ids):
                raise InvalidWebhook(f"ordinal {ordinal} of shard {shard} is not in {snapshot}")
            recipient = page.recipient_ids[ordinal % PAGE_SIZE]
        if not effect.is_about(recipient):
            raise InvalidWebhook("ff_send_id is not that of the recipient whom the event names")
        return recipient

    def _letter(self, bad: _Bad, now: datetime) -> bytes:
        letter = self._gate.letter(
            bad.original, bad.error, now, step=bad.step, source="ingest's topics"
        )
        if not bad.tenant:
            return letter
        known = decode(letter, DeadLetter)
        reason = bad.reason or known.reason
        return encode(replace(known, tenant=bad.tenant, run=bad.run, reason=reason))


class _UnknownRun(Missing):
    """An event of a run that nobody launched here."""


def writer_keys(parallelism: int) -> tuple[int, ...]:
    """One Flink key for each subtask, in the key groups that it owns."""
    return tuple(SHARD_KEYS[-(-subtask * SHARDS // parallelism)] for subtask in range(parallelism))


class WriterKey:
    """The Flink key of a record: any of the writers', by its content."""

    def __init__(self, parallelism: int) -> None:
        self._keys = writer_keys(parallelism)

    def __call__(self, data: bytes) -> int:
        """The key."""
        return self._keys[zlib.crc32(bytes(data)) % len(self._keys)]


def build(
    records: DataStream, sink: KafkaSink, parts: IngestParts, parallelism: int, output: Any
) -> None:
    """Wire the webhook-ingest job. ``output`` is the type of encoded records."""
    (
        records.key_by(WriterKey(parallelism), key_type=Types.INT())
        .process(IngestOperator(parts), output_type=output)
        .name("ingest")
        .uid("ingest")
        .sink_to(sink)
        .name("consent-and-dead-letters")
        .uid("consent-and-dead-letters-sink")
    )
