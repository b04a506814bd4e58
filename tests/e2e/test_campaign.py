"""A campaign from a plain producer's launch to the books, recipient by recipient."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from stack.simulator.config import SimulatorConfig
from stack.simulator.fate import EventKind, fate
from tests.e2e.world import TENANT, Crowd, One, World
from tests.stack_fixture import eventually

QUIET_ZONE = "Asia/Kolkata"
HOLDOUT_PERCENT = 5.0
ENDINGS = {
    "delivered": 0.8,
    "bounce": 0.08,
    "dropped": 0.04,
    "spamreport": 0.05,
    "unsubscribe": 0.05,
    "blocked": 0.3,
}
DEAD = {"pattern": "\\.bounce@", "action": "reject"}


def quiet_now(now: datetime) -> tuple[dict[str, int], int]:
    """Quiet hours in which the zone is now, and when they end there (20 to 80 s from now)."""
    local = now.astimezone(ZoneInfo(QUIET_ZONE))
    ends = (local + timedelta(seconds=20)).replace(second=0, microsecond=0) + timedelta(minutes=1)
    begins = local - timedelta(minutes=20)
    hours = {
        "start_minute": begins.hour * 60 + begins.minute,
        "end_minute": ends.hour * 60 + ends.minute,
    }
    return hours, int(ends.timestamp() * 1000)


def held_out(campaign: str, recipient: str) -> bool:
    """The holdout rule as it is documented: a share of the BLAKE2b space, by campaign."""
    text = f"holdout\0{TENANT}\0{campaign}\0{recipient}"
    mark = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
    return mark < HOLDOUT_PERCENT / 100 * 2**32


def agreed(one: One) -> bool:
    return bool({"email:offers", "email:*"} & one.consents)


def first_campaign(world: World, crowd: Crowd, category: str) -> dict[str, set[str]]:
    """A campaign by SMTP; who got it, and what their providers and they themselves say of it.

    Answers the reasons for which each recipient of it can't be sent to any more.
    """
    run = world.run_name("first")
    config = {"smtp": {"rules": [DEAD]}, "webhooks": {"proportions": ENDINGS}}
    with world.provider(**config):
        event = world.launch(run, crowd.name, category=category, providers=["smtp"])
        assert event.accepted, event.note
        world.wait_status(run)
        world.drain_webhooks()
        settings = SimulatorConfig.model_validate_json(json.dumps(world.ask("/config")))
    books = world.check_balanced(run, crowd)
    got = world.accepted(run)
    wanted = [one for one in crowd if agreed(one) and one.email]
    dead = {one.id for one in wanted if ".bounce@" in (one.email or "")}
    assert dead, "the crowd has addresses that bounce"
    assert set(got) == {one.message(run) for one in wanted if one.id not in dead}
    assert books.as_json()["failed_by_reason"] == {"address_refused": len(dead)}
    after: dict[str, set[str]] = {recipient: {"suppressed"} for recipient in dead}
    delivered = set()
    for one in wanted:
        if one.id in dead:
            continue
        # Whoever got it has used up the category's cap, unless something worse is known of them.
        after[one.id] = {"frequency_cap"}
        told = fate(settings.seed, one.message(run), settings)
        if told.delivered:
            delivered.add(one.message(run))
        ends = set()
        if told.has(EventKind.SPAM_REPORT) or told.has(EventKind.DROPPED):
            ends.add("suppressed")
        if told.bounced and not told.blocked:
            ends.add("suppressed")
        if told.has(EventKind.UNSUBSCRIBE):
            ends.add("consent_withdrawn")
        if ends:
            after[one.id] = ends
    assert books.delivered == len(delivered)
    assert world.engagement(run)["delivered"] == delivered

    refused = {recipient for recipient, why in after.items() if why != {"frequency_cap"}}
    ours = {one.id for one in crowd}

    def heard() -> bool:
        return refused == {one.recipient_id for one in world.consents()} & ours

    eventually(heard, what="bounces, complaints and unsubscribes are in the consent topic")
    assert {"suppressed", "consent_withdrawn"} <= {
        reason for recipient in refused for reason in after[recipient]
    }
    return after


def change_consents(world: World, crowd: Crowd, known: set[str]) -> dict[str, set[str] | None]:
    """Withdraw, grant, suppress and erase by the topic; what each then is, None for granted."""
    others = [one for one in crowd if one.id not in known]
    yes = [one for one in others if agreed(one)]
    no = [one for one in others if not agreed(one)]
    words: list[tuple[str, str, str, str]] = []
    after: dict[str, set[str] | None] = {}
    for one in yes[:40]:
        words.append((one.id, "email", "offers", "withdrawn"))
        after[one.id] = {"consent_withdrawn"}
    for one in yes[40:50]:
        words.append((one.id, "*", "*", "withdrawn"))
        after[one.id] = {"consent_withdrawn"}
    for one in yes[50:60]:
        words.append((one.id, "email", "*", "suppressed"))
        after[one.id] = {"suppressed"}
    for one in yes[60:65]:
        words.append((one.id, "*", "*", "erased"))
        after[one.id] = {"erased"}
    for one in yes[65:75]:
        # Of another topic or channel: no word on this campaign.
        words.append((one.id, "email", "news", "withdrawn"))
        words.append((one.id, "sms", "*", "suppressed"))
    for one in no[:40]:
        words.append((one.id, "email", "offers", "granted"))
        after[one.id] = None
    world.producer.consent(TENANT, words)
    time.sleep(0.02)
    back = yes[:5]
    world.producer.consent(TENANT, [(one.id, "email", "offers", "granted") for one in back])
    return after | {one.id: None for one in back}


def test_everybody_gets_what_they_should_and_all_books_say_so(world: World) -> None:
    everybody, old = world.crowds(5_000, None, "age >= 52")
    category = world.run_name("category")
    known = first_campaign(world, old, category)
    said: dict[str, set[str] | None] = dict(known)
    said |= change_consents(world, everybody, {one.id for one in old})

    run = world.run_name("second")
    hours, quiet_until_ms = quiet_now(datetime.now(UTC))
    cap = {
        "name": "once",
        "limit": 1,
        "window": "rolling",
        "length": 7 * 86_400_000,
        "channel": None,
        "category": category,
        "when_capped": "drop",
    }
    expected: dict[str, set[str]] = {}
    for one in everybody:
        words = said.get(one.id, set() if agreed(one) else {"no_consent"}) or set()
        if words and words != {"frequency_cap"}:
            expected[one.id] = words
        elif held_out("spring-offers", one.id):
            expected[one.id] = {"holdout"}
        elif words:
            expected[one.id] = words
        elif one.email is None:
            expected[one.id] = {"no_address"}
        elif ".bounce@" in one.email:
            expected[one.id] = {"address_refused", "provider_refused"}
        else:
            expected[one.id] = {"provider_accepted"}
    sent = {name for name, why in expected.items() if why == {"provider_accepted"}}
    config = {
        "sendgrid": {"rules": [DEAD]},
        "webhooks": {"proportions": {"delivered": 0.9, "bounce": 0.05}},
    }
    with world.provider(**config):
        event = world.launch(
            run,
            everybody.name,
            category=category,
            caps=[cap],
            quiet_hours=hours,
            holdout_percent=HOLDOUT_PERCENT,
        )
        assert event.accepted, event.note
        assert event.audience == len(everybody)
        world.wait_status(run, timeout=timedelta(seconds=180))
        world.drain_webhooks()
        settings = SimulatorConfig.model_validate_json(json.dumps(world.ask("/config")))
    books = world.check_balanced(run, everybody)

    # The provider against the oracle: who, at which address.
    got = world.accepted(run)
    by_message = {one.message(run): one for one in everybody}
    assert {by_message[message].id for message in got} == sent
    # The ledger and the rows against the same, recipient by recipient.
    assert world.ledger_accepted(run, everybody) == sent
    rows = world.classes(run)
    wrong = [
        (one.id, rows[one.shard, one.ordinal], expected[one.id])
        for one in everybody
        if rows[one.shard, one.ordinal][1] not in expected[one.id]
    ]
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"
    assert len(rows) == len(everybody)
    # The books against the oracle.
    by_reason = Counter(rows.values())
    found = books.as_json()
    assert found["accepted"] == len(sent) == by_reason["accepted", "provider_accepted"]
    assert found["skipped"] == {
        reason: count for (kind, reason), count in by_reason.items() if kind == "skipped"
    }
    assert set(found["skipped"]) == {
        "consent_withdrawn",
        "erased",
        "frequency_cap",
        "holdout",
        "no_address",
        "no_consent",
        "suppressed",
    }
    refused_at_once = [one for one, why in expected.items() if "address_refused" in why]
    assert found["failed"] == len(refused_at_once)
    assert (found["expired"], found["cancelled"], found["unknown"]) == (0, 0, 0)
    # Webhooks against fate.
    delivered = {one for one in got if fate(settings.seed, one, settings).delivered}
    assert world.engagement(run)["delivered"] == delivered
    assert books.delivered == len(delivered)
    check_quiet_hours(world, run, everybody, sent, quiet_until_ms)


def check_quiet_hours(
    world: World, run: str, crowd: Crowd, sent: set[str], quiet_until_ms: int
) -> None:
    """Whoever lives in the quiet zone was deferred, and got the message when the hours ended."""
    got = world.accepted(run)
    there = [one for one in crowd if one.zone == QUIET_ZONE and one.id in sent]
    assert len(there) > 30
    early = [one.id for one in there if got[one.message(run)]["accepted_at_ms"] < quiet_until_ms]
    assert not early
    rows = world.tables.query(
        "SELECT shard, ordinal FROM fanfare_steps FINAL WHERE tenant = {t:String} "
        "AND run = {r:String} AND kind = 'defer' AND reason = 'quiet_hours'",
        parameters={"t": TENANT, "r": run},
    ).result_rows
    assert {(one.shard, one.ordinal) for one in there} <= set(rows)
    zones = {(one.shard, one.ordinal): one.zone for one in crowd}
    assert {zones[place] for place in rows} == {QUIET_ZONE}
