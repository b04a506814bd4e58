"""SendGrid's event webhook: a body into events and consent changes. Pure.

Source: SendGrid's Event Webhook reference. A body is a JSON array of objects; custom args stand
flattened at the top level, ours begin with ``ff_``. Events are repeated and out of order by
contract, and carry ``sg_event_id``, the same in every repetition.

What leaves here names nobody: the address is not kept, addresses in a mail server's answer are
masked, and a clicked URL loses its query, which often holds a person's token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import orjson

from schemas.errors import InvalidWebhook
from schemas.ids import LegId, RecipientId, RunId, Tenant, derive, send_id
from schemas.pages import SHARDS
from schemas.records import (
    ConsentChange,
    ConsentStatus,
    EngagementEvent,
    EngagementKind,
    RawWebhook,
)

SENDGRID = "sendgrid"
OLDEST = timedelta(days=400)
"""An event further back than this from its arrival is refused: it is no event of ours, and each
month that a body names costs ClickHouse a partition."""
NEWEST = timedelta(days=1)

_KINDS: Mapping[str, EngagementKind] = {
    "processed": EngagementKind.PROCESSED,
    "deferred": EngagementKind.DEFERRED,
    "delivered": EngagementKind.DELIVERED,
    "bounce": EngagementKind.BOUNCED,
    "dropped": EngagementKind.DROPPED,
    "open": EngagementKind.OPENED,
    "click": EngagementKind.CLICKED,
    "spamreport": EngagementKind.COMPLAINED,
    "unsubscribe": EngagementKind.UNSUBSCRIBED,
    "group_unsubscribe": EngagementKind.UNSUBSCRIBED,
}

# Reasons of `dropped` that say something of the person; the others (quota, spam content, invalid
# header) are about the account or the message.
_DROPPED: Mapping[str, ConsentStatus] = {
    "bounced address": ConsentStatus.SUPPRESSED,
    "spam reporting address": ConsentStatus.SUPPRESSED,
    "invalid": ConsentStatus.SUPPRESSED,
    "unsubscribed address": ConsentStatus.WITHDRAWN,
}

_ADDRESS = re.compile(r"[^\s<>\"'(),;:@]+@[^\s<>\"'(),;:@]+")
_MAX_TEXT = 500
_MAX_ID = 200


@dataclass(frozen=True, slots=True)
class ConsentEffect:
    """What an event means for consent; ``recipient_id`` is empty where only the reference is known.

    ``ref`` is (shard, ordinal, generation); ``original`` the event's own bytes, for a dead letter.
    """

    event_id: str
    tenant: Tenant
    run: RunId
    leg: LegId
    send_id: str
    status: ConsentStatus
    at: datetime
    source: str
    recipient_id: str
    ref: tuple[int, int, int] | None
    original: bytes

    def is_about(self, recipient: str) -> bool:
        """Whether the event's message is the one that the run owed this recipient."""
        return send_id(self.tenant, self.run, self.leg, recipient) == self.send_id

    def change(self, recipient: str) -> ConsentChange:
        """The consent change, once it is known who the recipient is. The same for a replay.

        A leg is named by its channel; a provider's word is about the address, so about all topics.
        """
        return ConsentChange(
            change_id=derive("consent", (self.tenant, SENDGRID, self.event_id)),
            tenant=self.tenant,
            recipient_id=RecipientId(recipient),
            channel=self.leg,
            topic="*",
            status=self.status,
            at=self.at,
            source=self.source,
        )


@dataclass(frozen=True, slots=True)
class BadEvent:
    """An element of a body that is no event: its own bytes, and why."""

    index: int
    original: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """All that a body says. ``foreign`` counts events of messages that are not ours, ``ignored``
    those of a type without meaning here."""

    events: tuple[EngagementEvent, ...]
    consents: tuple[ConsentEffect, ...]
    bad: tuple[BadEvent, ...]
    foreign: int
    ignored: int


def parse_ref(ref: str) -> tuple[int, int, int] | None:
    """(shard, ordinal, generation) of ``shard.ordinal.generation``; None if it is no such thing."""
    parts = ref.split(".")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and len(p) <= 10 for p in parts):
        return None
    shard, ordinal, generation = (int(part) for part in parts)
    if shard >= SHARDS or ordinal >= 1 << 32:
        return None
    return shard, ordinal, generation


def parse_sendgrid(raw: RawWebhook) -> Parsed:
    """Events and consent effects of one webhook, in the body's order.

    One bad element harms no other. The tenant is the webhook's, whose key signed it; an event that
    claims another is bad.

    Raises:
        InvalidWebhook: the body is no JSON array.
    """
    try:
        body = orjson.loads(raw.body)
    except orjson.JSONDecodeError as error:
        raise InvalidWebhook(f"the body is no JSON: {error}") from error
    if not isinstance(body, list):
        raise InvalidWebhook(f"the body is a JSON {type(body).__name__}, expected an array")
    events: list[EngagementEvent] = []
    consents: list[ConsentEffect] = []
    bad: list[BadEvent] = []
    foreign = ignored = 0
    for index, item in enumerate(body):
        try:
            if not isinstance(item, dict):
                raise InvalidWebhook(f"an event is a JSON {type(item).__name__}")
            if "ff_send_id" not in item:
                foreign += 1
                continue
            if item.get("event") == "group_resubscribe":
                # A provider's click is no grant: granting is done where the terms were shown.
                ignored += 1
                continue
            event = _event(item, raw)
        except InvalidWebhook as error:
            bad.append(BadEvent(index, _bytes_of(item, raw), str(error)))
            continue
        events.append(event)
        effect = _effect(item, event, raw)
        if effect is not None:
            consents.append(effect)
    return Parsed(tuple(events), tuple(consents), tuple(bad), foreign, ignored)


def _text(item: Mapping[str, Any], name: str, limit: int = _MAX_ID) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value or len(value) > limit:
        raise InvalidWebhook(f"{name} must be a text of 1 to {limit} characters")
    return value


def _event(item: Mapping[str, Any], raw: RawWebhook) -> EngagementEvent:
    kind = _KINDS.get(_text(item, "event"))
    if kind is None:
        raise InvalidWebhook(f"event {item['event']!r} is no type of SendGrid's that is known here")
    stamp = item.get("timestamp")
    if not isinstance(stamp, int) or isinstance(stamp, bool) or not 0 < stamp < 1 << 33:
        raise InvalidWebhook("timestamp must be whole seconds since 1970")
    at = datetime.fromtimestamp(stamp, UTC)
    if not raw.received_at - OLDEST <= at <= raw.received_at + NEWEST:
        raise InvalidWebhook(f"timestamp {at.isoformat()} is too far from the time of arrival")
    if item.get("ff_tenant", raw.tenant) != raw.tenant:
        raise InvalidWebhook("ff_tenant is another tenant than the one whose key signed this")
    ref = item.get("ff_ref", "")
    return EngagementEvent(
        event_id=_text(item, "sg_event_id"),
        tenant=raw.tenant,
        run=RunId(_text(item, "ff_run")),
        leg=LegId(_text(item, "ff_leg")),
        send_id=_text(item, "ff_send_id"),
        ref=ref if isinstance(ref, str) and len(ref) <= _MAX_ID else "",
        kind=kind,
        at=at,
        provider=SENDGRID,
        provider_message_id=_loose(item, "sg_message_id"),
        reason=_reason(item),
        url=_url(_loose(item, "url", 2_000)),
    )


def _loose(item: Mapping[str, Any], name: str, limit: int = _MAX_ID) -> str:
    value = item.get(name, "")
    return value[:limit] if isinstance(value, str) else ""


def _reason(item: Mapping[str, Any]) -> str:
    parts = (_loose(item, "type"), _loose(item, "reason", _MAX_TEXT) or _loose(item, "response"))
    return _ADDRESS.sub("<address>", ": ".join(part for part in parts if part))[:_MAX_TEXT]


def _url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _bytes_of(item: object, raw: RawWebhook) -> bytes:
    """An event's own bytes; the whole body's where it is nested too deeply to be written again."""
    try:
        return orjson.dumps(item)
    except TypeError:
        return raw.body


def _effect(
    item: Mapping[str, Any], event: EngagementEvent, raw: RawWebhook
) -> ConsentEffect | None:
    status: ConsentStatus | None = None
    if event.kind is EngagementKind.BOUNCED:
        # 'blocked' is a refusal of this message (content, reputation), not a dead address.
        status = None if item.get("type") == "blocked" else ConsentStatus.SUPPRESSED
    elif event.kind is EngagementKind.COMPLAINED:
        status = ConsentStatus.SUPPRESSED
    elif event.kind is EngagementKind.UNSUBSCRIBED:
        status = ConsentStatus.WITHDRAWN
    elif event.kind is EngagementKind.DROPPED:
        status = _DROPPED.get(_loose(item, "reason").strip().lower())
    if status is None:
        return None
    return ConsentEffect(
        event_id=event.event_id,
        tenant=event.tenant,
        run=event.run,
        leg=event.leg,
        send_id=event.send_id,
        status=status,
        at=event.at,
        source=f"{SENDGRID}:{event.kind.value}",
        recipient_id=_loose(item, "ff_recipient"),
        ref=parse_ref(event.ref),
        original=_bytes_of(item, raw),
    )
