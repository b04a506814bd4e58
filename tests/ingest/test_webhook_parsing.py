"""SendGrid's events, normalised: kinds, consent effects, what is foreign, bad, or somebody's."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InvalidWebhook
from schemas.ids import Tenant, send_id
from schemas.records import ConsentStatus, EngagementKind, RawWebhook
from transforms.webhooks import Parsed, parse_ref, parse_sendgrid

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
OURS = {
    "email": "ann@example.com", "timestamp": int(NOW.timestamp()), "sg_event_id": "e1",
    "sg_message_id": "m1", "ff_tenant": "acme", "ff_run": "r", "ff_leg": "email",
    "ff_send_id": send_id("acme", "r", "email", "ann"), "ff_ref": "3.501.2",
}  # fmt: skip


def parsed(*events: Any) -> Parsed:
    body = orjson.dumps(list(events)) + b"\r\n"
    return parse_sendgrid(RawWebhook("w", "sendgrid", Tenant("acme"), NOW, {}, body))


def effect_of(**fields: Any) -> ConsentStatus | None:
    found = parsed(OURS | fields)
    assert not found.bad
    return found.consents[0].status if found.consents else None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("processed", EngagementKind.PROCESSED), ("deferred", EngagementKind.DEFERRED),
        ("delivered", EngagementKind.DELIVERED), ("bounce", EngagementKind.BOUNCED),
        ("dropped", EngagementKind.DROPPED), ("open", EngagementKind.OPENED),
        ("click", EngagementKind.CLICKED), ("spamreport", EngagementKind.COMPLAINED),
        ("unsubscribe", EngagementKind.UNSUBSCRIBED),
        ("group_unsubscribe", EngagementKind.UNSUBSCRIBED),
    ],
)  # fmt: skip
def test_each_type_has_its_kind(name: str, kind: EngagementKind) -> None:
    (event,) = parsed(OURS | {"event": name}).events
    assert (event.kind, event.event_id, event.at, event.run) == (kind, "e1", NOW, "r")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"event": "bounce", "type": "bounce"}, ConsentStatus.SUPPRESSED),
        ({"event": "bounce", "type": "blocked"}, None),
        ({"event": "spamreport"}, ConsentStatus.SUPPRESSED),
        ({"event": "unsubscribe"}, ConsentStatus.WITHDRAWN),
        ({"event": "group_unsubscribe"}, ConsentStatus.WITHDRAWN),
        ({"event": "dropped", "reason": "Bounced Address"}, ConsentStatus.SUPPRESSED),
        ({"event": "dropped", "reason": "Unsubscribed Address"}, ConsentStatus.WITHDRAWN),
        ({"event": "dropped", "reason": "Recipient List over Package Quota"}, None),
        ({"event": "delivered"}, None),
        ({"event": "deferred", "reason": "Bounced Address"}, None),
    ],
)
def test_consent_changes_only_by_what_is_about_the_person(
    fields: dict[str, str], status: ConsentStatus | None
) -> None:
    assert effect_of(**fields) is status


def test_an_effect_knows_whose_it_is_and_is_the_same_again() -> None:
    first, again = (parsed(OURS | {"event": "bounce"}).consents[0] for _ in range(2))
    assert first.ref == (3, 501, 2)
    assert first.is_about("ann")
    assert not first.is_about("bob")
    assert first.change("ann") == again.change("ann")


def test_nobody_is_named_in_what_is_kept() -> None:
    (event,) = parsed(
        OURS
        | {
            "event": "bounce", "type": "bounce", "url": "https://u:p@shop.example/a?token=1#x",
            "reason": "550 5.1.1 <ann@example.com>: ann@example.com unknown",
        }
    ).events  # fmt: skip
    assert event.reason == "bounce: 550 5.1.1 <<address>>: <address> unknown"
    assert event.url == "https://shop.example/a"
    assert "ann@example.com" not in repr(event)


def test_one_bad_event_harms_no_other() -> None:
    found = parsed(
        OURS | {"event": "open"}, 7, OURS | {"event": "exploded"}, {"event": "open"},
        OURS | {"event": "open", "timestamp": "soon"}, OURS | {"event": "group_resubscribe"},
        OURS | {"event": "open", "timestamp": 5}, OURS | {"event": "open", "ff_tenant": "other"},
        OURS | {"event": "open", "sg_event_id": ""},
    )  # fmt: skip
    assert [one.index for one in found.bad] == [1, 2, 4, 6, 7, 8]
    assert found.bad[0].original == b"7"
    assert (len(found.events), found.foreign, found.ignored) == (1, 1, 1)


@pytest.mark.parametrize("body", [b"", b"{}", b"[", b"\xff", b'"text"', b"[" * 100_000])
def test_what_is_no_array_is_refused_whole(body: bytes) -> None:
    with pytest.raises(InvalidWebhook):
        parse_sendgrid(RawWebhook("w", "sendgrid", Tenant("acme"), NOW, {}, body))


_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner),
    max_leaves=10,
)  # fmt: skip


@given(st.lists(st.dictionaries(st.sampled_from([*OURS, "event", "type", "reason", "url"]), _JSON)))
def test_whatever_comes_every_event_is_accounted_for(events: list[dict[str, Any]]) -> None:
    mixed = [OURS | one for one in events]
    found = parsed(*mixed)
    assert len(found.events) + len(found.bad) + found.foreign + found.ignored == len(mixed)


@given(st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_references_come_back(shard: int, ordinal: int, generation: int) -> None:
    assert parse_ref(f"{shard}.{ordinal}.{generation}") == (shard, ordinal, generation)


@pytest.mark.parametrize(
    "ref", ["", "1.2", "256.0.0", "1.4294967296.0", "-1.0.0", "1.²0.0", "a.b.c"]
)
def test_what_is_no_reference_is_none(ref: str) -> None:
    assert parse_ref(ref) is None


def test_what_is_nested_too_deeply_to_be_written_again_harms_nothing() -> None:
    deep = b'{"a":' * 600 + b"1" + b"}" * 600
    event = orjson.dumps(OURS | {"event": "spamreport"})
    body = (
        b"["
        + event[:-1]
        + b',"x":'
        + deep
        + b"},"
        + deep.replace(b'"a"', b'"ff_send_id"', 1)
        + b"]"
    )
    found = parse_sendgrid(RawWebhook("w", "sendgrid", Tenant("acme"), NOW, {}, body))
    assert len(found.events) == len(found.bad) == 1
    assert found.bad[0].original == found.consents[0].original == body
