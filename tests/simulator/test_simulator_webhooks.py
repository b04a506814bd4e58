"""Webhooks: content, signature, batching, repetition, and what is never lost."""

from __future__ import annotations

import base64
import json
import smtplib
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from stack.simulator import EventKind, SimulatorConfig, fate, updated
from tests.simulator.conftest import Provider, Receiver, mail, running

SIGNATURE = "x-twilio-email-event-webhook-signature"
TIMESTAMP = "x-twilio-email-event-webhook-timestamp"


def _quick(receiver: Receiver, **changes: Any) -> dict[str, Any]:
    return {
        "url": receiver.url,
        "min_delay_ms": 1,
        "max_delay_ms": 20,
        "batch_ms": 20,
        "retry_first_ms": 20,
        **changes,
    }


def _send_many(provider: Provider, count: int, run: str = "run-1") -> None:
    people = [mail(f"s-{n}", run=run)["personalizations"][0] for n in range(count)]
    for start in range(0, count, 1000):
        assert provider.send(mail("x", personalizations=people[start : start + 1000]))[0] == 202


def _drain(provider: Provider, seconds: int = 10) -> dict[str, Any]:
    status, answer = provider.control("POST", f"/webhooks/drain?timeout={seconds}")
    assert (status, answer["drained"]) == (200, True), answer
    found: dict[str, Any] = answer
    return found


def _verifies(key: str, signature: str, timestamp: str, body: bytes) -> bool:
    public = load_der_public_key(base64.b64decode(key))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    try:
        public.verify(base64.b64decode(signature), timestamp.encode() + body, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def test_every_post_is_signed_over_timestamp_and_raw_body(
    provider: Provider, receiver: Receiver
) -> None:
    provider.configure(webhooks=_quick(receiver))
    _send_many(provider, 20)
    _drain(provider)
    key = (provider.record_dir / "webhook-key.pem.pub").read_text().strip()
    assert provider.get("/webhooks")["public_key"] == key
    assert receiver.posts
    for headers, body, _ in receiver.posts:
        assert body.endswith(b"]\r\n")
        assert headers["content-type"] == "application/json"
        assert abs(int(headers[TIMESTAMP]) - time.time()) < 10
        assert _verifies(key, headers[SIGNATURE], headers[TIMESTAMP], body)
        assert not _verifies(key, headers[SIGNATURE], headers[TIMESTAMP], body[:-2])
        assert not _verifies(key, headers[SIGNATURE], "1" + headers[TIMESTAMP], body)


def test_events_are_those_of_the_fate_and_no_others(provider: Provider, receiver: Receiver) -> None:
    changes = {
        "seed": 11,
        "webhooks": _quick(
            receiver,
            proportions={"delivered": 0.7, "bounce": 0.2, "dropped": 0.1, "deferred": 0.2},
        ),
    }
    provider.configure(**changes)
    _send_many(provider, 300)
    counts = _drain(provider)
    config = updated(SimulatorConfig(), changes)
    expected = {
        (f"s-{n}", event.kind.value)
        for n in range(300)
        for event in fate(11, f"s-{n}", config, f"s-{n}@example.com").events
    }
    events = receiver.events()
    assert {(event["ff_send_id"], event["event"]) for event in events} == expected
    assert len(events) == len(expected) == counts["acked_events"]
    assert len({event["sg_event_id"] for event in events}) == len(events)
    assert counts["scheduled_by_event"] == Counter(kind for _, kind in expected)


def test_an_event_carries_what_sendgrids_do(provider: Provider, receiver: Receiver) -> None:
    provider.configure(
        webhooks=_quick(receiver, proportions={"open": 1.0, "click": 1.0}),
        sendgrid={"rules": [{"pattern": "bad", "action": "bounce"}]},
    )
    _, headers, _ = provider.send(mail("good"))
    provider.send(mail("bad"))
    before = time.time()
    _drain(provider)
    events = {(event["ff_send_id"], event["event"]): event for event in receiver.events()}
    for event in events.values():
        assert event["email"] == f"{event['ff_send_id']}@example.com"
        assert (event["ff_run"], event["ff_leg"]) == ("run-1", "email")
        assert abs(event["timestamp"] - before) < 10
        assert 0 < len(event["sg_event_id"]) <= 100
    delivered = events["good", "delivered"]
    assert delivered["sg_message_id"].startswith(headers["X-Message-Id"] + ".")
    assert delivered["smtp-id"].startswith("<")
    assert delivered["response"].startswith("250")
    bounce = events["bad", "bounce"]
    assert bounce["type"] in ("bounce", "blocked")
    assert bounce["status"][0] == "5" and bounce["reason"].startswith("550 ")
    assert events["good", "click"]["url"].startswith("https://")
    assert events["good", "open"]["useragent"]
    assert ("bad", "delivered") not in events


def test_posts_hold_up_to_the_batch_size(provider: Provider, receiver: Receiver) -> None:
    provider.configure(webhooks=_quick(receiver, batch_events=100, min_delay_ms=5, max_delay_ms=5))
    _send_many(provider, 1000)
    _drain(provider)
    sizes = [len(json.loads(body)) for _, body, _ in receiver.posts]
    assert max(sizes) == 100
    assert len(sizes) < sum(sizes) / 50


def test_a_refused_post_is_repeated_with_backoff(provider: Provider, receiver: Receiver) -> None:
    receiver.statuses = [500, 404, 302]
    provider.configure(
        webhooks=_quick(
            receiver,
            proportions={"delivered": 0.0, "bounce": 1.0, "dropped": 0.0},
            processed=False,
            retry_first_ms=100,
        )
    )
    provider.send(mail("s"))
    counts = _drain(provider)
    bodies = [body for _, body, _ in receiver.posts]
    assert len(bodies) == 4 and len(set(bodies)) == 1
    times = [at for _, _, at in receiver.posts]
    waits = [later - sooner for sooner, later in pairwise(times)]
    assert 0.09 < waits[0] < waits[1] < waits[2] < 1.0
    assert (counts["retried_posts"], counts["acked_events"], counts["pending_events"]) == (3, 1, 0)
    assert counts["failed_posts"] == 3
    assert counts["last_error"].endswith("answered 302")


def test_an_unreachable_receiver_is_given_up_in_the_end_and_counted(provider: Provider) -> None:
    provider.configure(
        webhooks={
            "url": "http://127.0.0.1:9/",
            "min_delay_ms": 1,
            "max_delay_ms": 2,
            "batch_ms": 10,
            "retry_first_ms": 30,
            "give_up_s": 0.2,
        }
    )
    _send_many(provider, 5)
    assert provider.control("POST", "/webhooks/drain?timeout=0")[0] == 504
    counts = _drain(provider)
    assert counts["acked_events"] == 0
    assert counts["gave_up_events"] == counts["scheduled_events"] > 0
    assert counts["last_error"]


def test_what_does_not_fit_is_counted(provider: Provider, receiver: Receiver) -> None:
    provider.configure(webhooks=_quick(receiver, max_pending_events=7))
    _send_many(provider, 50)
    counts = _drain(provider)
    assert counts["acked_events"] == 7
    assert counts["dropped_events"] == counts["scheduled_events"] - 7 > 50


def test_duplicates_repeat_the_event_id_and_disorder_reverses(
    provider: Provider, receiver: Receiver
) -> None:
    provider.configure(
        webhooks=_quick(
            receiver,
            duplicate_rate=1.0,
            disorder_rate=1.0,
            min_delay_ms=60,
            max_delay_ms=60,
            batch_ms=10,
        )
    )
    _send_many(provider, 3)
    counts = _drain(provider)
    events = receiver.events()
    times = Counter(event["sg_event_id"] for event in events)
    assert set(times.values()) == {2}
    assert counts["repeated_events"] == len(times)
    first: dict[tuple[str, str], int] = {}
    for position, event in enumerate(events):
        first.setdefault((event["ff_send_id"], event["event"]), position)
    disordered = [n for n in range(3) if (f"s-{n}", "delivered") in first]
    assert disordered
    for n in disordered:
        assert first[f"s-{n}", "delivered"] < first[f"s-{n}", "processed"]


def test_a_second_acceptance_has_events_of_its_own(provider: Provider, receiver: Receiver) -> None:
    provider.configure(webhooks=_quick(receiver))
    provider.send(mail("s"))
    provider.send(mail("s"))
    _drain(provider)
    ids = Counter(event["sg_event_id"] for event in receiver.events())
    assert set(ids.values()) == {1}
    assert len(ids) == 2 * len(fate(0, "s", SimulatorConfig()).events)


def test_smtp_has_the_same_webhooks_unless_told_otherwise(
    provider: Provider, receiver: Receiver
) -> None:
    provider.configure(webhooks=_quick(receiver))
    for send_id, wanted in (("heard", True), ("silent", False)):
        provider.configure(smtp={"webhooks": wanted})
        with smtplib.SMTP("127.0.0.1", provider.smtp_port, "x", timeout=5) as client:
            client.sendmail(
                "a@example.com",
                ["b@example.com"],
                f"Message-ID: <{send_id}@fanfare>\r\nX-Fanfare-Leg: email\r\n\r\nx\r\n",
            )
    _drain(provider)
    events = receiver.events()
    assert {event["ff_send_id"] for event in events} == {"heard"}
    assert {event["smtp-id"] for event in events} == {"<heard@fanfare>"}
    assert {event["ff_leg"] for event in events} == {"email"}


def test_messages_accepted_without_an_answer_have_webhooks(
    provider: Provider, receiver: Receiver
) -> None:
    provider.configure(webhooks=_quick(receiver), sendgrid={"faults": {"reset_after_rate": 1.0}})
    with pytest.raises(ConnectionResetError):
        provider.send(mail("s"))
    _drain(provider)
    assert "s" in {event["ff_send_id"] for event in receiver.events()}


def test_only_this_machine_may_be_told(provider: Provider, tmp_path: Path) -> None:
    for url in ("http://192.0.2.1/", "https://example.com/", "http://localhost.example.com/"):
        status, answer = provider.control("PUT", "/config", {"webhooks": {"url": url}})
        assert status == 400
        assert answer["errors"][0]["field"] == "webhooks.url"
    assert provider.get("/config")["webhooks"]["url"] is None
    with pytest.raises(RuntimeError, match="--allow-remote"):
        Provider(tmp_path / "refused", "--webhook-url", "http://192.0.2.1/")
    url = "http://192.0.2.1/"
    with running(tmp_path / "allowed", "--webhook-url", url, "--allow-remote") as remote:
        assert remote.get("/config")["webhooks"]["url"] == url


def test_events_not_yet_sent_survive_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    key = tmp_path / "key.pem"
    arguments = ("--webhook-url", receiver.url, "--webhook-key-file", str(key), "--seed", "5")
    with running(tmp_path / "record", *arguments) as provider:
        _send_many(provider, 100)
        planned = provider.get("/webhooks")["scheduled_events"]
        receiver.statuses = [500] * 3
        time.sleep(0.6)
        assert provider.stop() == 0
    public = (tmp_path / "key.pem.pub").read_text()
    with running(tmp_path / "record", *arguments, "--set", "webhooks.batch_ms=20") as provider:
        _drain(provider, 20)
    assert (tmp_path / "key.pem.pub").read_text() == public
    assert oct(key.stat().st_mode & 0o777) == "0o600"
    good = {event["sg_event_id"] for event in receiver.events()}
    config = updated(SimulatorConfig(), {"seed": 5})
    assert len(good) == planned == sum(len(fate(5, f"s-{n}", config).events) for n in range(100))
    assert EventKind.DELIVERED.value in {event["event"] for event in receiver.events()}
    assert not (tmp_path / "record" / "events.pending").exists()
