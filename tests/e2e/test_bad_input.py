"""Bad input: each has a clear reason, its bytes are kept, and everybody else gets theirs."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from schemas import topics
from schemas.codec import encode
from schemas.ids import SnapshotId, Tenant
from schemas.pages import bitmap_bytes
from schemas.reasons import Channel, Lane, Reason, RunStatus
from schemas.records import RawWebhook
from schemas.snapshot import shard_file_name
from stack.cli_jobs import app as jobs_app
from tests.e2e.producer import COMMAND, CONSENT, campaign, now_ms
from tests.e2e.world import TENANT, Crowd, World
from tests.stack_fixture import eventually

SENDS = topics.sends_topic(Lane.PROMOTIONAL, Channel.EMAIL)
ENDLESS = (
    "{% for a in range(900) %}{% for b in range(900) %}{% for c in range(900) %}"
    "{% endfor %}{% endfor %}{% endfor %}Hello"
)


def test_what_is_no_record_becomes_a_dead_letter_whole(world: World) -> None:
    """In every topic that is read; the operators that read it and the reasons are as expected."""
    mark = str(now_ms()).encode()
    unknown = b"\xc3\x01" + b"\x07" * 8 + mark
    readers = {
        topics.COMMANDS: {"coordinate"},
        topics.CONSENT: {"decide"},
        topics.PAGE_RESULTS: {"coordinate", "ingest"},
        topics.OUTCOMES: {"coordinate", "decide", "ingest"},
        SENDS: {"delivery"},
        topics.WEBHOOKS_RAW: {"ingest"},
    }
    expected: dict[tuple[str, bytes], Reason] = {}
    for topic, operators in readers.items():
        name = topic.encode()
        for operator in operators:
            expected[operator, b"no record, " + mark + name] = Reason.UNKNOWN_SCHEMA
            expected[operator, unknown + name] = Reason.UNKNOWN_SCHEMA
        world.producer.put(topic, b"no record, " + mark + name, unknown + name)
    # Ours, but cut short or of another topic: the bytes are kept all the same.
    cut = CONSENT(
        {
            "change_id": "c", "tenant": TENANT, "recipient_id": mark.decode(), "channel": "email",
            "topic": "offers", "status": "granted", "at": now_ms(), "source": "me",
        }
    )  # fmt: skip
    strange_kind = COMMAND(
        {
            "command_id": mark.decode(), "tenant": TENANT, "run": "r", "kind": "explode",
            "issued_at": now_ms(), "issued_by": "me",
        }
    )  # fmt: skip
    far_future = COMMAND(
        {
            "command_id": mark.decode(), "tenant": TENANT, "run": "r", "kind": "pause",
            "issued_at": 2**62, "issued_by": "me",
        }
    )  # fmt: skip
    no_array = encode(
        RawWebhook(mark.decode(), "sendgrid", Tenant(TENANT), world.now(), {}, b'{"no": "array"}')
    )
    world.producer.put(topics.CONSENT, cut[:-4])
    world.producer.put(topics.COMMANDS, strange_kind, far_future, cut)
    world.producer.put(topics.WEBHOOKS_RAW, no_array)
    expected["decide", cut[:-4]] = Reason.MALFORMED
    expected["coordinate", strange_kind] = Reason.MALFORMED
    expected["coordinate", far_future] = Reason.MALFORMED
    expected["coordinate", cut] = Reason.UNKNOWN_SCHEMA
    expected["ingest", no_array] = Reason.MALFORMED

    def letters() -> dict[tuple[str, bytes], Reason]:
        return {
            (letter.step.partition("/")[0], letter.original): letter.reason
            for letter in world.dead_letters()
            if mark in letter.original
        }

    eventually(lambda: len(letters()) >= len(expected), what="all are dead letters")
    found = letters()
    # A foreign value may be malformed to one and of an unknown schema to another: both are told.
    assert set(found) == set(expected)
    wrong = {
        key: (found[key], reason)
        for key, reason in expected.items()
        if found[key] is not reason and not key[1].startswith(b"no record")
    }
    assert not wrong
    told = [letter for letter in world.dead_letters() if mark in letter.original]
    assert all(letter.detail and letter.source for letter in told)
    works(world, "after-rubbish")


def works(world: World, what: str) -> None:
    """All jobs go on: a small campaign runs to its end."""
    crowd = world.crowd(1_000)
    run = world.run_name(what)
    event = world.launch(run, crowd.name)
    assert event.accepted, event.note
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    assert found["accepted"] == len(crowd.consenting())


def post(url: str, body: bytes, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def webhooks_counted(world: World) -> dict[str, int]:
    with urllib.request.urlopen(world.at.receiver + "/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    name = 'fanfare_receiver_webhooks_total{result="'
    return {
        line.removeprefix(name).partition('"')[0]: int(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(name)
    }


def test_forged_and_huge_webhooks_are_refused_and_counted(world: World) -> None:
    world.drain_webhooks()  # those of earlier messages would be counted
    before = webhooks_counted(world)
    appended = len(world.read(topics.WEBHOOKS_RAW))
    url = world.at.receiver + "/webhooks/sendgrid"
    forged = {
        "X-Twilio-Email-Event-Webhook-Signature": "TUVVQ0lRRA==",
        "X-Twilio-Email-Event-Webhook-Timestamp": "1700000000",
    }
    assert post(url, b"[]", forged) == 403
    assert post(url, b"[]", {}) == 403
    assert post(url, b"x" * 1_000_001, forged) == 413
    after = webhooks_counted(world)
    grown = {
        name: count - before.get(name, 0) for name, count in after.items() if name != "accepted"
    }
    assert {name: count for name, count in grown.items() if count} == {
        "invalid_signature": 1,
        "unsigned": 1,
        "oversized": 1,
    }
    assert len(world.read(topics.WEBHOOKS_RAW)) == appended


def test_launches_that_cannot_work_are_refused_with_what_to_do(world: World) -> None:
    audience = world.crowd(1_000).name
    name = world.run_name("refused")
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("no audience snapshot 'ffff", {"snapshot": "f" * 32}),
        ("snapshot: expected the 32 hex digits", {"snapshot": "../../../etc"}),
        ("does more than 50000 steps", {"text": ENDLESS}),
        ("legs[0]: text line 1", {"text": "{% for %}"}),
        ("uses 'favourite_colour', which the snapshot", {"text": "{{ favourite_colour }}"}),
        ("legs[0]", {"text": "{{ ''.__class__ }}"}),
        ("failed on each of 20 people", {"text": "{{ [][0] }}"}),
        ("is in the past", {"deadline": now_ms() - 1000}),
        ("rate_per_second", {"rate_per_second": -1.0}),
        ("a rate must be", {"rate_per_second": 1e-320}),
        ("holdout_percent: expected 0 to 100", {"holdout_percent": 101.0}),
        ("valid_for", {"valid_for": 86_400_000}),
        ("quiet_hours", {"quiet_hours": {"start_minute": -5, "end_minute": 10**9}}),
        ("fallback_zone", {"fallback_zone": "Mars/Olympus_Mons"}),
        ("legs: expected at least one leg", {"legs": []}),
        ("an e-mail needs a subject", {"subject": " "}),
        ("legs[0].routes", {"providers": []}),
    ]
    sent = {}
    for number, (said, changes) in enumerate(wrong):
        run = f"{name}-{number}"
        spec = campaign(TENANT, run, **{"snapshot": audience, **changes})
        sent[world.producer.command("launch", TENANT, run, launch=spec)] = (run, said)
    for command, (run, said) in sent.items():
        event = world.answer(command)
        assert (event.run, event.accepted, event.status) == (run, False, RunStatus.REFUSED), said
        assert said in event.note, event.note
        assert world.stats(run)["requests"] == 0


def test_a_launch_of_another_tenants_audience_is_refused(world: World) -> None:
    crowd = world.crowd(1_000)
    run = world.run_name("stranger")
    spec = campaign("somebody-else", run, crowd.name)
    event = world.answer(world.producer.command("launch", "somebody-else", run, launch=spec))
    assert not event.accepted
    assert "belongs to another tenant" in event.note


def test_a_template_that_fails_on_one_persons_data_fails_for_them_alone(world: World) -> None:
    crowd = world.crowd(2_000)
    run = world.run_name("one-fails")
    event = world.launch(
        run, crowd.name, text="You ordered every {{ 365 // (orders | int) }} days."
    )
    assert event.accepted, event.note
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    hit = [one for one in crowd.consenting() if one.attributes["orders"] == "0"]
    assert 20 < len(hit) < len(crowd) / 4
    assert found["failed_by_reason"] == {"rendering_failed": len(hit)}
    assert found["accepted"] == len(crowd.consenting()) - len(hit)
    # Nobody without an address was tried: they are skipped, and said to be.
    assert found["skipped"]["no_address"] == sum(
        one.email is None and bool({"email:offers", "email:*"} & one.consents) for one in crowd
    )
    named = set()
    letters = [letter for letter in world.dead_letters() if letter.run == run]
    for letter in letters:
        assert letter.reason is Reason.RENDERING_FAILED
        assert "text line 1" in letter.detail
        named |= {
            (letter.shard, letter.page * 500 + index)
            for index in range(500)
            if int.from_bytes(letter.ordinals, "little") >> index & 1
        }
    assert named == {(one.shard, one.ordinal) for one in hit}
    rows = world.classes(run)
    assert all(rows[place] == ("failed", "rendering_failed") for place in named)


def flip(crowd: Crowd, shard: int, offset: int, folder: Path) -> None:
    path = folder / "snapshots" / crowd.name / shard_file_name(shard)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_damaged_pages_are_named_and_everybody_else_gets_theirs(world: World) -> None:
    crowd = world.crowd(3_000)
    index_page, body_page = crowd.snapshot.manifest.pages[10], crowd.snapshot.manifest.pages[20]
    for entry, block in ((index_page, index_page.index), (body_page, body_page.body)):
        offset = block.offset + block.length // 2
        flip(crowd, entry.shard, offset, world.store.root)
    run = world.run_name("damaged")
    event = world.launch(run, crowd.name)
    assert event.accepted, event.note
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    unread = [one for one in crowd if one.shard == index_page.shard]
    unsendable = [one for one in crowd.consenting() if one.shard == body_page.shard]
    assert found["skipped"]["corrupt_page"] == len(unread)
    assert found["failed_by_reason"] == {"corrupt_page": len(unsendable)}
    lost = {one.id for one in (*unread, *unsendable)}
    assert set(world.accepted(run)) == {
        one.message(run) for one in crowd.consenting() if one.id not in lost
    }
    rows = world.classes(run)
    assert all(rows[one.shard, one.ordinal] == ("skipped", "corrupt_page") for one in unread)
    logs = "".join(
        path.read_text(errors="replace")
        for path in world.home.logs.glob("flink-taskmanager-*.log*")
    )
    assert f"page {index_page.page} of shard {index_page.shard} is skipped" in logs
    letters = [letter for letter in world.dead_letters() if letter.run == run]
    assert {(one.shard, one.step, one.reason) for one in letters} == {
        (index_page.shard, "decide/page", Reason.CORRUPT_PAGE),
        (body_page.shard, "delivery/request", Reason.CORRUPT_PAGE),
    }
    assert all(one.leg and one.ordinals for one in letters)


def test_a_snapshot_that_is_deleted_in_mid_campaign_is_waited_for(world: World) -> None:
    crowd = world.crowd(3_000)
    run = world.run_name("deleted")
    folder = world.store.root / "snapshots" / crowd.name
    begins = now_ms() + 4_000
    event = world.launch(run, crowd.name, start_at=begins, deadline=begins + 3_600_000)
    assert event.accepted, event.note
    away = folder.with_name("away-" + crowd.name)
    folder.rename(away)
    eventually(
        lambda: world.events(run)[-1].deferred == len(crowd), timedelta(seconds=60), "all put off"
    )
    assert world.events(run)[-1].status is RunStatus.RUNNING
    assert not world.accepted(run)
    away.rename(folder)
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    assert set(world.accepted(run)) == {one.message(run) for one in crowd.consenting()}
    assert found["accepted"] == len(crowd.consenting())


def test_checkpoints_that_cannot_be_written_are_told_and_lose_nothing(world: World) -> None:
    crowd = world.crowd(3_000)
    run = world.run_name("unwritable")
    assert world.launch(run, crowd.name, rate_per_second=100.0).accepted
    world.wait_accepted(run, 50)
    folder = world.home.flink / "checkpoints" / world.jobs.ids["campaigns"]
    away = folder.with_name("away")
    folder.rename(away)
    folder.write_text("a file is where the folder was, as a full disk lets nothing be written")
    told: list[dict[str, Any]] = []

    def listed() -> int:
        result = CliRunner().invoke(jobs_app, ["list", "--json", "--home", str(world.home.root)])
        told[:] = [one for one in json.loads(result.stdout) if one["id"] == folder.name]
        return result.exit_code

    try:
        eventually(lambda: listed() == 1 and bool(told[-1]["trouble"]), what="it is told")
    finally:
        folder.unlink()
        away.rename(folder)
    assert told[-1]["state"] == "RUNNING"
    assert "full or not writable" in told[-1]["trouble"]
    eventually(lambda: listed() == 0, what="checkpoints are made again")
    world.wait_status(run)
    world.check_balanced(run, crowd)
    assert set(world.accepted(run)) == {one.message(run) for one in crowd.consenting()}
    assert world.stats(run)["duplicates"] == 0


def test_reorders_of_nobody_are_refused(world: World) -> None:
    crowd = world.crowd(1_000)
    run = world.run_name("reorder")
    assert world.launch(run, crowd.name).accepted
    world.wait_status(run)
    shard = crowd.snapshot.manifest.pages[0].shard
    one = {"leg": "email", "shard": shard, "page": 0, "ordinals": bitmap_bytes(1)}
    commands = [
        world.producer.command("reorder", TENANT, run, reorders=[{**one, **change}])
        for change in (
            {"leg": "sms"},
            {"shard": -1},
            {"shard": 256},
            {"page": -1},
            {"page": 10**9},
            {"ordinals": b""},
            {"ordinals": b"\xff" * 100_000},
        )
    ]
    for command in commands:
        event = world.answer(command)
        assert not event.accepted
    assert SnapshotId(crowd.name) == event.snapshot
    world.check_balanced(run, crowd)
