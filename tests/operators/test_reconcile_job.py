"""The webhook-ingest job itself: an unknown becomes accepted by a webhook, on a real cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from pipelines.audience import AudienceRequest, build_audience
from schemas.codec import decode, encode
from schemas.ids import send_id
from schemas.reasons import Outcome, Reason
from schemas.records import Outcomes, RawWebhook
from sinks import ledger_upkeep
from sinks.books import read_books
from sinks.clickhouse import connect, create_tables
from sinks.store import FileStore
from stack import flink_jobs
from stack.cli_unknowns import app
from stack.layout import PROJECT_ROOT, Home, endpoints
from stack.profiles import generate
from stack.topics import create_topics
from tests.operators.place import EMAIL, Mail, Place, in_one_shard
from tests.stack_fixture import eventually, running_stack


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    services = ("kafka", "redis", "clickhouse", "flink")
    with running_stack(tmp_path_factory.mktemp("engine"), only=services, taskmanagers=1) as home:
        client = connect(endpoints(home).clickhouse)
        create_tables(client)
        client.close()
        yield home


@pytest.fixture
def run(
    engine: Home, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    name = f"r{time.time_ns()}"
    monkeypatch.setenv("FANFARE_TOPIC_PREFIX", f"{name}.")
    monkeypatch.setenv("FANFARE_INGEST_GROUP", f"{name}.ingest")
    monkeypatch.setenv("FANFARE_CHECKPOINT_INTERVAL", "PT1S")
    create_topics(endpoints(engine).kafka, f"{name}.")
    folder = tmp_path_factory.mktemp("people")
    generate(600, 7, folder / "people.csv")
    store = FileStore(endpoints(engine).store)
    built = build_audience(AudienceRequest((folder / "people.csv",), "acme"), store)
    made = Place(engine, name, store.open_snapshot(built.snapshot))
    made.quiet = True
    yield made
    made.close()


def webhook(place: Place, mail: Mail, kind: str) -> bytes:
    recipient = place.recipient(mail)
    event = {
        "email": f"{recipient}@example.com", "event": kind, "timestamp": int(time.time()),
        "sg_event_id": f"{kind}-{mail.shard}-{mail.ordinal}", "sg_message_id": f"m-{mail.ordinal}",
        "ff_send_id": send_id(place.tenant, place.run, EMAIL, recipient),
        "ff_tenant": place.tenant, "ff_run": place.run, "ff_leg": EMAIL,
        "ff_ref": f"{mail.shard}.{mail.ordinal}.{mail.generation}",
    }  # fmt: skip
    now = datetime.now(UTC)
    body = orjson.dumps([event])
    return encode(RawWebhook(f"w-{kind}-{mail.ordinal}", "sendgrid", place.tenant, now, {}, body))


def test_webhooks_settle_unknowns(run: Place) -> None:
    run.launch()
    mails = run.decide()
    before, after, never = in_one_shard(mails, 3)[:3]
    # This webhook comes before anybody knew that the outcome is unknown.
    run.put(webhook(run, before, "delivered"))
    job = flink_jobs.submit(run.home, PROJECT_ROOT / "jobs" / "webhook_ingest.py", parallelism=1)
    flink_jobs.wait_running(run.home, job)
    run.deliver(dict.fromkeys((before, after, never), Outcome.UNKNOWN))
    run.tell(*(run.outcome(mail, Outcome.ACCEPTED) for mail in mails
               if mail not in (before, after, never)))  # fmt: skip

    def settled() -> dict[int, Any]:
        return {
            run_index: (group.outcome, group.provider_ids)
            for value in run.read("fanfare.outcomes")
            for group in decode(value, Outcomes).groups
            if group.reason is Reason.SETTLED_BY_WEBHOOK
            for run_index in group.indexes
        }

    def told(mail: Mail) -> tuple[Outcome, tuple[str, ...]]:
        return Outcome.ACCEPTED, (f"m-{mail.ordinal}",)

    eventually(
        lambda: settled() == {before.ordinal: told(before)},
        timedelta(seconds=60),
        f"the early webhook settles: {flink_jobs.last_failure(run.home, job)}",
    )
    run.put(webhook(run, after, "open"))
    eventually(
        lambda: settled() == {before.ordinal: told(before), after.ordinal: told(after)},
        timedelta(seconds=60),
        "the late webhook settles",
    )
    ref = run.ref(before.shard)
    places = [mail.ordinal for mail in (before, after, never)]
    entries = ledger_upkeep.entries(run.redis, ref, places)
    assert [entry.accepted for entry in entries] == [True, True, False]
    run.eventually("coordinate heard of all", lambda: run.pending() == 0)

    def books() -> dict[str, Any]:
        now = datetime.now(UTC)
        return read_books(run.clickhouse, run.tenant, run.run, now).as_json()

    eventually(lambda: books()["unknown"] == 1, what="the books follow")
    assert books()["balanced"], books()["errors"]
    rows = json.loads(run.fanfare(app, run.run, "--tenant", run.tenant, "--json").stdout)
    assert [(row["ordinal"], row["standing"]) for row in rows["unknowns"]] == [
        (never.ordinal, "held")
    ]
