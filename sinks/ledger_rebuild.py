"""Rebuilding the ledger of a run that Redis lost, from Kafka.

``transforms.rebuild`` says what the ledger was, as far as the topics of sends and outcomes tell;
what was under way when it was lost is held in doubt, so that nothing is sent twice, and settled by
webhooks or by hand. Here is how a rebuilt ledger is made safe to use.

**Why delivery takes it.** Delivery keeps in Flink's state how far it saw each ledger (dataset and
sequence) and refuses another dataset or a sequence behind. A rebuild writes the dataset of the
launch, so that coordinate's idempotent creation agrees as well, and a sequence that jumps to the
time in milliseconds: beyond whatever was seen of a ledger that is called less than a thousand
times a second. An old copy of Redis that comes back, or a ledger created anew and empty, has no
such sequence and stays refused. Only the script of the rebuild writes it; it leaves when and by
whom in the ledger.

**Why no predecessor writes to it.** Redis lost the epochs of delivery keys too. Were they to begin
at 1 again, they would meet those of processes that still run. So a rebuild raises the epoch of
every delivery key to the time in seconds, once: from 1 a second on no restart catches up with the
clock. Whoever wrote before is fenced, fails, is restarted by Flink and takes the next epoch. What
other runs of the lane had in flight at that moment becomes unknown, as at any kill.

**What keeps it consistent.** The run must not be running while it is rebuilt (Redis says so, or
has not heard of it: both mean stop), each shard is written by one script, and accepted bits that
Redis still has stay. A rebuild that was broken off is repeated whole. A ledger that is there and
lacks nothing of what the outcomes tell is left alone, unless the operator says that Redis lost
writes: a rolled-back ledger lacks claims, and only delivery knows that.

Afterwards Redis must hear of the run's status again: pause (where it was not) and resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from clickhouse_connect.driver.client import Client as ClickHouse
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from schemas import topics
from schemas.codec import decode, leading_strings, to_millis
from schemas.errors import FanfareError, MalformedRecord, Missing, MissingLedger, Unavailable
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant
from schemas.pages import DELIVERY_KEYS, SHARDS
from schemas.reasons import Lane, RunStatus
from schemas.records import CampaignSpec, Outcomes, Send
from schemas.tables import RUN_EVENTS
from sinks import ledger_upkeep, runs
from sinks.books import utc
from sinks.clickhouse import asking
from sinks.kafka_client import read_all
from sinks.redis_client import Client as Redis
from sinks.store import FileStore
from transforms.ledger import Held, LedgerRef
from transforms.rebuild import History, Told


class NotNow(FanfareError):
    """The ledger must not be rebuilt as things stand; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Launched:
    """What is known of a run from its launch."""

    tenant: Tenant
    run: RunId
    spec_id: ObjectId
    spec: CampaignSpec
    snapshot: SnapshotId
    shard_counts: tuple[int, ...]
    at: datetime

    @property
    def dataset(self) -> str:
        """The name under which coordinate made the ledgers."""
        return self.spec_id[:16]


@dataclass(frozen=True, slots=True)
class LegCounts:
    """What a rebuild writes of a leg."""

    leg: LegId
    recipients: int
    accepted: int
    held: int
    in_doubt: int
    """Of the held, those of whose request nothing at all was heard."""
    closed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Ledgers told again, by leg, each with its 256 shards."""

    launched: Launched
    ledgers: Mapping[LegId, tuple[Told, ...]]
    gaps: tuple[str, ...]
    """Topics that no longer reach back to the launch."""

    def counts(self) -> tuple[LegCounts, ...]:
        """What would be written."""
        found = []
        for leg, shards in self.ledgers.items():
            matters = [one for told in shards for one in told.matters.values()]
            held = [one for one in matters if isinstance(one, Held)]
            found.append(
                LegCounts(
                    leg,
                    sum(self.launched.shard_counts),
                    sum(told.accepted_count for told in shards),
                    len(held),
                    sum(not one.provider for one in held),
                    len(matters) - len(held),
                )
            )
        return tuple(found)


def launched_run(clickhouse: ClickHouse, store: FileStore, tenant: str, run: str) -> Launched:
    """A run as it was launched.

    Raises:
        Missing: ClickHouse has no launch of it.
        MissingObject, MissingSnapshot, Corrupt: its definition or audience is gone.
        Unavailable, Refused: ClickHouse.
    """
    rows = asking(
        clickhouse,
        f"SELECT spec, snapshot, at FROM {RUN_EVENTS.name} WHERE tenant = {{tenant:String}} "  # noqa: S608
        "AND run = {run:String} AND spec != '' ORDER BY at LIMIT 1",
        {"tenant": tenant, "run": run},
    ).result_rows
    if not rows:
        raise Missing(f"ClickHouse knows no launch of run {run!r} of tenant {tenant!r}")
    spec_id, snapshot, at = rows[0]
    manifest = store.open_snapshot(snapshot).manifest
    return Launched(
        Tenant(tenant),
        RunId(run),
        ObjectId(spec_id),
        decode(store.get_object("spec", spec_id), CampaignSpec),
        SnapshotId(snapshot),
        tuple(manifest.shard_size(shard) for shard in range(SHARDS)),
        utc(at),
    )


def plan(
    servers: str,
    prefix: str,
    launched: Launched,
    now: datetime,
    gaps_in_doubt: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Tell the ledgers of a run again.

    Args:
        servers: Kafka's.
        prefix: before every topic's name.
        launched: which run.
        now: when what is in doubt was found to be.
        gaps_in_doubt: where topics no longer reach back to the launch, hold everybody without an
            outcome; else that is refused.
        progress: told what is read.

    Raises:
        NotNow: a topic does not reach back.
        Unavailable: Kafka.
    """
    names = [topics.sends_topic(launched.spec.lane, leg.channel) for leg in launched.spec.legs]
    sends = [prefix + name for name in dict.fromkeys(names)]
    outcomes = prefix + topics.OUTCOMES
    gaps = [name for name in (*sends, outcomes) if not reaches_back(servers, name, launched.at)]
    if gaps and not gaps_in_doubt:
        raise NotNow(
            f"{', '.join(gaps)} no longer reach back to the launch at {launched.at.isoformat()}: "
            "who was sent to can't be told. --gaps-in-doubt holds everybody without an outcome"
        )
    history = History()
    # Sends first: an outcome that is written meanwhile is of a send that was read.
    for name in sends:
        progress(f"reading {name}")
        for value in _of_run(read_all(servers, name), launched):
            history.add_send(decode(value, Send))
    progress(f"reading {outcomes}")
    for value in _of_run(read_all(servers, outcomes), launched):
        history.add_outcomes(decode(value, Outcomes))
    ledgers = {
        leg.leg: tuple(
            history.ledger(leg.leg, shard, count, now, bool(gaps))
            for shard, count in enumerate(launched.shard_counts)
        )
        for leg in launched.spec.legs
    }
    return Plan(launched, ledgers, tuple(gaps))


def _of_run(values: Iterator[bytes], launched: Launched) -> Iterator[bytes]:
    """The values of one run; sends and outcomes begin with tenant and run."""
    wanted = (launched.tenant, launched.run)
    for value in values:
        try:
            if leading_strings(value, 2) == wanted:
                yield value
        except MalformedRecord:
            continue  # no record of ours: the job that reads it makes it a dead letter


def reaches_back(servers: str, topic: str, since: datetime) -> bool:
    """Whether a topic still holds all that was written to it since then. Raises Unavailable."""
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=servers.split(","), enable_auto_commit=False, fetch_max_wait_ms=50
        )
        try:
            numbers = consumer.partitions_for_topic(topic) or ()
            partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
            if not partitions:
                raise Unavailable(f"there is no topic {topic}")
            consumer.assign(partitions)
            begins = consumer.beginning_offsets(partitions)
            ends = consumer.end_offsets(partitions)
            # The first record at or after the launch: were any before it lost, it would be the
            # first of all that are kept.
            firsts = consumer.offsets_for_times(dict.fromkeys(partitions, to_millis(since)))
        finally:
            consumer.close()
    except KafkaError as error:
        raise Unavailable(f"Kafka at {servers} could not be read: {error}") from error
    for partition, begin in begins.items():
        first = firsts.get(partition)
        oldest_is_younger = first is not None and first.offset <= begin
        nothing_is_kept = begin == ends[partition]
        if begin > 0 and (oldest_is_younger or nothing_is_kept):
            return False
    return True


def check(redis: Redis, found: Plan, force: bool) -> RunStatus | None:
    """Whether the ledger may be rebuilt now; the run's status in Redis, None: it is not there.

    Raises:
        NotNow: the run is running, or its ledger lacks nothing and ``force`` is not said.
        Unavailable: Redis.
    """
    launched = found.launched
    published = runs.read(redis, launched.tenant, launched.run)
    status = None if published is None else published.status
    if status is RunStatus.RUNNING:
        raise NotNow(
            f"run {launched.run} is running: pause it first (`fanfare campaign pause "
            f"{launched.run}`), so that nothing is sent meanwhile"
        )
    if not force and _is_whole(redis, found):
        raise NotNow(
            f"the ledger of run {launched.run} is there and has all that the outcomes tell: there "
            "is nothing to rebuild. If delivery refuses it as rolled back, say --force"
        )
    return status


def _is_whole(redis: Redis, found: Plan) -> bool:
    launched = found.launched
    for leg, shards in found.ledgers.items():
        for shard, told in enumerate(shards):
            ref = LedgerRef(launched.tenant, launched.run, leg, shard)
            try:
                bits = set(ledger_upkeep.accepted_ordinals(redis, ref))
                ledger_upkeep.view(redis, ref)
            except MissingLedger:
                return False
            if not bits.issuperset(_ordinals(told.accepted)):
                return False
    return True


def _ordinals(bitmap: bytes) -> list[int]:
    return [
        at * 8 + bit
        for at, byte in enumerate(bitmap)
        if byte
        for bit in range(8)
        if byte << bit & 128
    ]


def write(redis: Redis, found: Plan, by: str, force: bool) -> None:
    """Write the ledgers of a plan. May be repeated. Call ``check`` first.

    Raises:
        Corrupt: a ledger of another launch stands there.
        Unavailable: some are written; do it all again.
    """
    launched = found.launched
    lane: Lane = launched.spec.lane
    for position, (leg, shards) in enumerate(found.ledgers.items()):
        for shard, told in enumerate(shards):
            # The first shards are one of each delivery key: each epoch is raised once.
            raises = force if position == 0 and shard < DELIVERY_KEYS else None
            ledger_upkeep.rebuild(
                redis,
                LedgerRef(launched.tenant, launched.run, leg, shard),
                lane,
                launched.dataset,
                launched.shard_counts[shard],
                told.accepted,
                told.matters,
                by,
                raises,
            )


def afterwards(status: RunStatus | None, run: str) -> Sequence[str]:
    """What is to be done after a rebuild, for people."""
    lines = [
        "Delivery looks at the ledger by itself. Where it is fenced it restarts once, and works "
        "under a new epoch.",
        f"What is held is listed by `fanfare unknowns {run}`; webhooks settle it.",
    ]
    if status is None:
        lines.append(
            f"Redis has not heard of the run: `fanfare campaign pause {run}`, then "
            f"`fanfare campaign resume {run}`, tells it. Nothing is sent before."
        )
    elif status is RunStatus.PAUSED:
        lines.append(f"Resume it when you are ready: `fanfare campaign resume {run}`.")
    return lines
