"""Campaigns and people for the tests of decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from schemas.ids import LegId, ObjectId, RecipientId, RunId, SnapshotId, Tenant
from schemas.pages import bitmap_bytes, bitmap_of
from schemas.reasons import Channel, Lane
from schemas.records import (
    CampaignSpec,
    CapRule,
    LegSpec,
    PageOrder,
    Route,
    WhenCapped,
    WhenZoneUnknown,
    WindowKind,
)
from schemas.snapshot import HAS_EMAIL, HAS_PHONE
from transforms.decide import Person

NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
TENANT = Tenant("acme")
EMAIL = LegId("email")
SMS = LegId("sms")


def leg(channel: Channel) -> LegSpec:
    return LegSpec(
        leg=LegId(channel.value),
        channel=channel,
        routes=(Route("smtp", "main"),),
        sender_address="news@acme.example",
        sender_name="Acme",
        reply_to=None,
        subject="Hello",
        html="<p>Hello</p>",
        text="Hello",
    )


def campaign(**changes: Any) -> CampaignSpec:
    spec = CampaignSpec(
        tenant=TENANT,
        run=RunId("spring-1"),
        campaign="spring",
        snapshot=SnapshotId("0" * 32),
        category="promo",
        topic="offers",
        lane=Lane.PROMOTIONAL,
        legs=(leg(Channel.EMAIL), leg(Channel.SMS)),
        start_at=None,
        deadline=NOON + timedelta(days=3),
        quiet_hours=None,
        when_zone_unknown=WhenZoneUnknown.SKIP,
        fallback_zone=None,
        caps=(),
        holdout_percent=0.0,
        rate_per_second=None,
        valid_for=timedelta(minutes=10),
        defaults={},
    )
    return replace(spec, **changes)


def cap(
    limit: int,
    window: WindowKind | timedelta,
    channel: Channel | None = None,
    category: str | None = None,
    when_capped: WhenCapped = WhenCapped.DEFER,
) -> CapRule:
    return CapRule(
        name="cap",
        limit=limit,
        window=window if isinstance(window, WindowKind) else WindowKind.ROLLING,
        length=window if isinstance(window, timedelta) else timedelta(),
        channel=channel,
        category=category,
        when_capped=when_capped,
    )


def person(**changes: Any) -> Person:
    one = Person(
        recipient_id=RecipientId("ada"),
        zone="Europe/Berlin",
        consents=frozenset({"email:offers", "sms:*"}),
        flags=HAS_EMAIL | HAS_PHONE,
    )
    return replace(one, **changes)


@dataclass(frozen=True, slots=True)
class Page:
    """The facts of a page, given person by person."""

    recipient_ids: list[str]
    zones: list[str]
    consent_sets: tuple[frozenset[str], ...]
    consent_index: list[int]
    flags: bytes


def page_of(people: list[Person]) -> Page:
    sets = sorted({one.consents for one in people}, key=sorted)
    return Page(
        recipient_ids=[one.recipient_id for one in people],
        zones=[one.zone for one in people],
        consent_sets=tuple(sets),
        consent_index=[sets.index(one.consents) for one in people],
        flags=bytes(one.flags for one in people),
    )


def order(spec: CampaignSpec, indexes: range | list[int], **changes: Any) -> PageOrder:
    one = PageOrder(
        tenant=spec.tenant,
        run=spec.run,
        leg=EMAIL,
        spec=ObjectId("1" * 64),
        snapshot=spec.snapshot,
        shard=7,
        page=3,
        generation=0,
        ordinals=bitmap_bytes(bitmap_of(indexes)),
        ordered_at=NOON,
    )
    return replace(one, **changes)
