"""The webhook-ingest job on a real cluster: Kafka in, exact tables, consents, letters."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from clickhouse_connect.driver.client import Client
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic
from typer.testing import CliRunner, Result

from pipelines.audience import AudienceRequest, build_audience
from schemas import topics
from schemas.codec import decode, encode
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant, send_id
from schemas.pages import bitmap_bytes, full_bitmap
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import (
    CommandKind,
    ConsentChange,
    ConsentStatus,
    DeadLetter,
    OutcomeGroup,
    Outcomes,
    PageResult,
    RawWebhook,
    RunEvent,
    SkipGroup,
)
from sinks.books import read_books
from sinks.clickhouse import connect, create_tables
from sinks.store import FileStore, Snapshot
from stack import flink_jobs
from stack.cli_books import app
from stack.layout import PROJECT_ROOT, Home, endpoints, processes
from stack.profiles import generate
from tests.stack_fixture import eventually

JOB = PROJECT_ROOT / "jobs" / "webhook_ingest.py"
RUN = RunId("spring-1")
EMAIL = LegId("email")


class World:
    """One tenant's topics, tables and snapshot on the stack, and a job that reads them."""

    def __init__(self, home: Home, prefix: str) -> None:
        self.home, self.prefix, self.tenant = home, prefix, Tenant(prefix.rstrip("."))
        self.at = endpoints(home)
        self.client: Client = connect(self.at.clickhouse)
        create_tables(self.client)
        admin = KafkaAdminClient(bootstrap_servers=self.at.kafka)
        admin.create_topics([NewTopic(prefix + topic.name, 2, 1) for topic in topics.TOPICS])
        admin.close()
        self.producer = KafkaProducer(bootstrap_servers=self.at.kafka, acks="all", linger_ms=5)
        self.jobs: list[str] = []

    def put(self, topic: str, *values: bytes) -> None:
        for value in values:
            self.producer.send(self.prefix + topic, value)
        self.producer.flush()

    def read(self, topic: str) -> list[bytes]:
        name = self.prefix + topic
        consumer = KafkaConsumer(bootstrap_servers=self.at.kafka, auto_offset_reset="earliest")
        partitions = [TopicPartition(name, number) for number in range(2)]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        values: list[bytes] = []
        for partition in partitions:
            consumer.seek_to_beginning(partition)
        while any(consumer.position(one) < ends[one] for one in partitions):
            for records in consumer.poll(1000).values():
                values += [record.value for record in records]
        consumer.close()
        return values

    def close(self) -> None:
        self.producer.close()
        self.client.close()


@pytest.fixture
def world(stack: Home, monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[World]:
    prefix = f"t{time.time_ns()}."
    monkeypatch.setenv("FANFARE_TOPIC_PREFIX", prefix)
    monkeypatch.setenv("FANFARE_INGEST_GROUP", prefix + "ingest")
    monkeypatch.setenv("FANFARE_CHECKPOINT_INTERVAL", "PT1S")
    made = World(stack, prefix)
    yield made
    for job in flink_jobs.running_jobs(stack):
        if job.id in made.jobs:
            flink_jobs.cancel(stack, job.id)
    made.close()


def submitted(world: World) -> str:
    job = flink_jobs.submit(world.home, JOB, parallelism=1)
    world.jobs.append(job)
    flink_jobs.wait_running(world.home, job)
    return job


def snapshot(world: World, folder: Path) -> Snapshot:
    generate(3000, 7, folder / "p.csv")
    store = FileStore(world.at.store)
    built = build_audience(AudienceRequest((folder / "p.csv",), world.tenant), store)
    return store.open_snapshot(built.snapshot)


def launched(world: World, audience: Snapshot) -> RunEvent:
    """A launch that is older than every row, however slow the machine."""
    counts = tuple(audience.manifest.shard_size(shard) for shard in range(256))
    return RunEvent(
        event_id="launch", tenant=world.tenant, run=RUN, campaign="spring", version=1,
        status=RunStatus.RUNNING, at=datetime.now(UTC) - timedelta(minutes=2), command_id="c",
        command=CommandKind.LAUNCH, by="me", accepted=True, note="", spec=ObjectId("a" * 64),
        snapshot=SnapshotId(audience.id), audience=sum(counts), legs=("email",),
        pending=sum(counts), ordered=0, open=0, deferred=0, shard_counts=counts,
    )  # fmt: skip


def decided(world: World, audience: Snapshot, shard: int) -> tuple[PageResult, Outcomes]:
    """A page of which the first is skipped, the last fails and the others are accepted."""
    count = audience.manifest.pages_of(shard)[0].count
    now = datetime.now(UTC)
    place = (world.tenant, RUN, EMAIL, SnapshotId(audience.id), shard, 0)
    skip = SkipGroup(Reason.NO_CONSENT, bitmap_bytes(1))
    sends = bitmap_bytes(full_bitmap(count) & ~1)
    result = PageResult(*place, 0, now, now, sends, (skip,), ())
    accepted = tuple(range(1, count - 1))
    groups = [
        OutcomeGroup(Outcome.FAILED, Reason.PROVIDER_REFUSED, "sendgrid", 0, (count - 1,))
    ]  # fmt: skip
    if accepted:
        ids = tuple(f"{shard}-{index}" for index in accepted)
        groups.append(
            OutcomeGroup(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, "sendgrid", 0, accepted, ids)
        )
    return result, Outcomes(*place, now, tuple(groups))


def event(world: World, audience: Snapshot, shard: int, ordinal: int, kind: str) -> dict[str, Any]:
    recipient = audience.read_index(shard, 0).recipient_ids[ordinal]
    return {
        "email": f"{recipient}@example.com", "event": kind, "timestamp": int(time.time()),
        "sg_event_id": f"{kind}-{shard}-{ordinal}", "sg_message_id": f"{shard}-{ordinal}",
        "ff_send_id": send_id(world.tenant, RUN, EMAIL, recipient), "ff_tenant": world.tenant,
        "ff_run": RUN, "ff_leg": EMAIL, "ff_ref": f"{shard}.{ordinal}.0", "type": "bounce",
        "reason": f"550 no such user <{recipient}@example.com>",
    }  # fmt: skip


def webhook(world: World, number: int, body: bytes) -> bytes:
    return encode(RawWebhook(f"w{number}", "sendgrid", world.tenant, datetime.now(UTC), {}, body))


def test_everything_arrives_exactly_once(world: World, tmp_path: Path) -> None:
    audience = snapshot(world, tmp_path)
    pairs = [
        decided(world, audience, shard)
        for shard in range(256)
        if audience.manifest.shard_size(shard) >= 3
    ]
    shards = [result.shard for result, _ in pairs]
    bounced = [(shard, 1) for shard in shards[:20]]
    events = [event(world, audience, shard, 1, "delivered") for shard in shards[20:]]
    events += [event(world, audience, shard, ordinal, "bounce") for shard, ordinal in bounced]
    events += [event(world, audience, shards[0], 0, "open") | {"ff_send_id": "other", "ff_ref": ""}]
    lying = event(world, audience, shards[0], 0, "bounce") | {"ff_ref": f"{shards[1]}.1.0"}
    bodies = [orjson.dumps(events[part::4]) for part in range(4)]
    # Webhooks come before the launch is known, everything twice, in between what is no record.
    world.put(topics.WEBHOOKS_RAW, *(webhook(world, n, body) for n, body in enumerate(bodies)))
    job = submitted(world)
    for _ in range(2):
        world.put(topics.OUTCOMES, *(encode(outcomes) for _, outcomes in pairs))
        world.put(topics.PAGE_RESULTS, *(encode(result) for result, _ in pairs))
    world.put(topics.RUNS, encode(launched(world, audience)))
    world.put(topics.WEBHOOKS_RAW, *(webhook(world, n, body) for n, body in enumerate(bodies)))
    garbage = [b"", b"garbage", encode(pairs[0][0])[:-3], b"\xc3\x01" + b"\0" * 20]
    world.put(topics.PAGE_RESULTS, *garbage)
    world.put(
        topics.WEBHOOKS_RAW,
        webhook(world, 8, b"{}"),
        webhook(world, 9, orjson.dumps([lying, 7, {"event": "open"}])),
    )

    wanted = {
        "audience": audience.manifest.counts.audience,
        "accepted": sum(audience.manifest.shard_size(shard) - 2 for shard in shards),
        "skipped": {"no_consent": len(shards)},
        "failed": len(shards),
        "pending": sum(
            audience.manifest.shard_size(shard) for shard in range(256) if shard not in shards
        ),
        "delivered": len(shards) - 20,
        "engagement": {"bounced": 21, "delivered": len(shards) - 20, "opened": 1},
        "balanced": True,
    }

    def found() -> dict[str, Any]:
        try:
            books = read_books(world.client, world.tenant, RUN, datetime.now(UTC)).as_json()
        except Exception as error:
            return {"error": str(error)}
        return {name: books[name] for name in wanted}

    deadline = time.monotonic() + 40
    while found() != wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found() == wanted, flink_jobs.last_failure(world.home, job)

    def consents() -> set[tuple[str, ConsentStatus, str]]:
        changes = [decode(value, ConsentChange) for value in world.read(topics.CONSENT)]
        assert {(one.tenant, one.topic, one.source) for one in changes} <= {
            (world.tenant, "*", "sendgrid:bounced")
        }
        return {(one.recipient_id, one.status, one.channel) for one in changes}

    suppressed = {
        (audience.read_index(shard, 0).recipient_ids[n], ConsentStatus.SUPPRESSED, "email")
        for shard, n in bounced
    }
    eventually(lambda: consents() == suppressed, what="bounces became suppressions")

    refused = {*garbage, b"7", orjson.dumps(lying)}

    def read_letters() -> list[DeadLetter]:
        return [decode(value, DeadLetter) for value in world.read(topics.DEAD_LETTERS)]

    def all_there() -> bool:
        found = {letter.original for letter in read_letters()}
        return refused <= found and len(found) > len(refused)

    eventually(all_there, what="letters are there")
    letters = read_letters()
    originals = [letter.original for letter in letters]
    assert {letter.reason for letter in letters} == {Reason.MALFORMED, Reason.UNKNOWN_SCHEMA}
    assert len(set(originals)) == len(garbage) + 3
    texts = world.client.query(
        "SELECT groupUniqArray(reason) FROM fanfare_engagement WHERE tenant = {t:String}",
        parameters={"t": world.tenant},
    ).result_rows[0][0]
    assert texts == ["bounce: 550 no such user <<address>>"]
    hourly = world.client.query(
        "SELECT sum(n) FROM (SELECT uniqExactMerge(events) AS n FROM fanfare_engagement_hourly "
        "WHERE tenant = {t:String} GROUP BY leg, kind)",
        parameters={"t": world.tenant},
    ).result_rows
    assert hourly == [(sum(wanted["engagement"].values()),)]
    check_command(world, audience, shards[0])


def check_command(world: World, audience: Snapshot, shard: int) -> None:
    """`fanfare books` says the same, knows that all is taken in, and tells a story."""
    arguments = [RUN, "--tenant", world.tenant, "--home", str(world.home.root)]

    def fanfare_books(*more: str) -> Result:
        return CliRunner().invoke(app, [*arguments, *more])

    def caught_up() -> bool:
        done = fanfare_books("--json")
        assert done.exit_code in (0, 1), done.output
        return bool(json.loads(done.stdout)["lag"]["caught_up"])

    eventually(caught_up, what="the lag is zero")
    # The launch's own count of pending is older than the rows: nothing to compare, no error.
    done = fanfare_books()
    assert done.exit_code == 0, done.output
    assert "The books balance." in done.stdout
    recipient = audience.read_index(shard, 0).recipient_ids[1]
    story = json.loads(fanfare_books("--json", "--recipient", recipient).stdout)
    assert [one["what"] for one in story["moments"]] == ["send", "accepted", "webhook bounced"]
    assert story["moments"][1]["detail"]["provider_id"] == f"{shard}-1"
    assert story["classes"] == {"email": {"class": "accepted", "reason": "provider_accepted"}}
    assert "bounced" in fanfare_books("--recipient", recipient).stdout
    nobody = fanfare_books("--recipient", "nobody")
    assert (nobody.exit_code, "is not in the run's snapshot" in nobody.output) == (2, True)


def test_nothing_is_lost_while_clickhouse_is_away(world: World, tmp_path: Path) -> None:
    audience = snapshot(world, tmp_path)
    pairs = [
        decided(world, audience, shard)
        for shard in range(256)
        if audience.manifest.shard_size(shard) >= 3
    ]
    job = submitted(world)
    world.put(topics.RUNS, encode(launched(world, audience)))

    def audience_known() -> bool:
        try:
            return read_books(world.client, world.tenant, RUN, datetime.now(UTC)) is not None
        except Exception:
            return False

    eventually(audience_known, what="the run is in ClickHouse")
    process = processes(world.home)["clickhouse"].pid
    (working,) = flink_jobs.taskmanagers_of(world.home, job)
    taskmanager = processes(world.home)[working].pid
    assert process is not None
    assert taskmanager is not None
    os.kill(process, signal.SIGSTOP)
    try:
        world.put(topics.OUTCOMES, *(encode(outcomes) for _, outcomes in pairs))
        world.put(topics.PAGE_RESULTS, *(encode(result) for result, _ in pairs))
        completed = checkpoints(world, job)
        # Barriers pass while the writer waits: at least two that began after the records came.
        eventually(
            lambda: checkpoints(world, job) >= completed + 2,
            timedelta(seconds=40),
            "checkpoints complete while ClickHouse is away",
        )
        os.kill(taskmanager, signal.SIGKILL)
        time.sleep(1)
    finally:
        os.kill(process, signal.SIGCONT)

    def accepted() -> int:
        return int(
            read_books(world.client, world.tenant, RUN, datetime.now(UTC)).as_json()["accepted"]
        )

    wanted = sum(audience.manifest.shard_size(result.shard) - 2 for result, _ in pairs)
    eventually(lambda: accepted() == wanted, timedelta(seconds=60), "all outcomes are there")


def checkpoints(world: World, job: str) -> int:
    counts = flink_jobs.rest(world.home, "GET", f"/jobs/{job}/checkpoints")["counts"]
    return int(counts["completed"])


def test_the_job_stops_when_most_of_what_it_reads_is_broken(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANFARE_DEAD_LETTER_WINDOW", "100")
    monkeypatch.setenv("FANFARE_FAILURES", "1")
    world.put(topics.OUTCOMES, *(b"broken %d" % number for number in range(3000)))
    job = flink_jobs.submit(world.home, JOB, parallelism=1)
    assert flink_jobs.wait_ended(world.home, job) == "FAILED"
    assert "records are dead letters, more than 5%" in flink_jobs.last_failure(world.home, job)
