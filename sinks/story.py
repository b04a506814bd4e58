"""One recipient's story in a run: every decision, outcome, webhook and dead letter, by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from clickhouse_connect.driver.client import Client

from schemas.errors import Missing
from schemas.ids import send_id
from schemas.snapshot import Manifest, shard_of
from schemas.tables import DEAD_LETTERS, ENGAGEMENT, STEPS, StepKind
from sinks.books import RunFacts, utc
from sinks.clickhouse import asking
from transforms.books import Step, class_of

_WEBHOOK = "webhook "
_SECOND = timedelta(milliseconds=999)


class PageIds(Protocol):
    """A page's recipients."""

    @property
    def recipient_ids(self) -> Sequence[str]:
        """Ids by position in the page."""


class ReadableSnapshot(Protocol):
    """A snapshot whose pages can be read."""

    @property
    def manifest(self) -> Manifest:
        """Its pages."""

    def read_index(self, shard: int, page: int) -> PageIds:
        """A page. Raises CorruptPage."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that was said of the recipient. ``generation`` is -1 where there is none."""

    at: datetime
    leg: str
    what: str
    reason: str
    generation: int
    detail: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Story:
    """All that is known of one recipient in one run."""

    recipient: str
    shard: int
    ordinal: int
    classes: Mapping[str, tuple[str, str]]
    """Class and reason by leg, as the books count it."""
    send_ids: Mapping[str, str]
    moments: tuple[Moment, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs: times in ISO 8601."""
        return {
            "recipient": self.recipient,
            "shard": self.shard,
            "ordinal": self.ordinal,
            "classes": {
                leg: {"class": name, "reason": reason}
                for leg, (name, reason) in self.classes.items()
            },
            "send_ids": dict(self.send_ids),
            "moments": [asdict(one) | {"at": one.at.isoformat()} for one in self.moments],
        }


def place_of(snapshot: ReadableSnapshot, tenant: str, recipient: str) -> tuple[int, int]:
    """Shard and ordinal of a recipient, by reading the pages of its shard.

    Raises:
        Missing: the snapshot does not have it.
        CorruptPage: a page that may have it is damaged.
    """
    shard = shard_of(tenant, recipient)
    for page in snapshot.manifest.pages_of(shard):
        ids = snapshot.read_index(shard, page.page).recipient_ids
        if recipient in ids:
            return shard, page.first_ordinal + list(ids).index(recipient)
    raise Missing(f"recipient {recipient!r} of tenant {tenant!r} is not in the run's snapshot")


def read_story(
    client: Client,
    tenant: str,
    run: str,
    facts: RunFacts,
    snapshot: ReadableSnapshot,
    recipient: str,
) -> Story:
    """Tell a recipient's story.

    Raises:
        Missing, CorruptPage: as ``place_of``.
        Unavailable, Refused: ClickHouse.
    """
    shard, ordinal = place_of(snapshot, tenant, recipient)
    ids = {leg: str(send_id(tenant, run, leg, recipient)) for leg in facts.legs}
    parameters = {
        "tenant": tenant,
        "run": run,
        "shard": shard,
        "ordinal": ordinal,
        "sends": list(ids.values()),
    }
    steps = asking(
        client,
        "SELECT leg, at, toUInt8(kind), reason, generation, rank, until, provider, "  # noqa: S608
        f"provider_id, attempts, detail FROM {STEPS.name} FINAL WHERE tenant = {{tenant:String}} "
        "AND run = {run:String} AND shard = {shard:UInt8} AND ordinal = {ordinal:UInt32}",
        parameters,
    ).result_rows
    events = asking(
        client,
        "SELECT leg, at, kind, reason, provider, provider_id, url, event_id "  # noqa: S608
        f"FROM {ENGAGEMENT.name} FINAL WHERE tenant = {{tenant:String}} AND run = {{run:String}} "
        "AND send_id IN {sends:Array(String)}",
        parameters,
    ).result_rows
    letters = asking(
        client,
        f"SELECT leg, last_at, step, reason, generation, detail, letter_id FROM "  # noqa: S608
        f"{DEAD_LETTERS.name} FINAL WHERE tenant = {{tenant:String}} AND run = {{run:String}} "
        "AND shard = {shard:UInt8} AND has(ordinals, {ordinal:UInt32})",
        parameters,
    ).result_rows
    moments: list[Moment] = []
    said: dict[str, list[Step]] = {leg: [] for leg in facts.legs}
    for leg, at, kind, reason, generation, rank, until, provider, own, attempts, detail in steps:
        step = Step(leg, shard, ordinal, int(generation), StepKind(int(kind)), reason, int(rank))
        said.setdefault(leg, []).append(step)
        found = {
            "until": utc(until).isoformat() if step.kind is StepKind.DEFER else "",
            "provider": provider,
            "provider_id": own,
            "attempts": str(attempts or ""),
            "detail": detail,
        }
        moments.append(
            Moment(utc(at), leg, step.kind.name.lower(), reason, int(generation), _told(found))
        )
    for leg, at, kind, reason, provider, own, url, event in events:
        found = {"provider": provider, "provider_id": own, "url": url, "event": event}
        moments.append(Moment(utc(at), leg, f"{_WEBHOOK}{kind}", reason, -1, _told(found)))
    for leg, at, step_name, reason, generation, detail, letter in letters:
        found = {"step": step_name, "detail": detail, "letter": letter}
        moments.append(Moment(utc(at), leg, "dead letter", reason, int(generation), _told(found)))
    moments.sort(key=_order)
    return Story(
        recipient=recipient,
        shard=shard,
        ordinal=ordinal,
        classes={leg: class_of(theirs) for leg, theirs in said.items()},
        send_ids=ids,
        moments=tuple(moments),
    )


def _order(one: Moment) -> tuple[datetime, int, int]:
    if one.what.startswith(_WEBHOOK):
        # Providers tell whole seconds: what led to an event comes before it.
        return one.at + _SECOND, 0, 0
    kinds = [kind.name.lower() for kind in StepKind]
    return one.at, one.generation, kinds.index(one.what) if one.what in kinds else len(kinds)


def _told(found: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if value}
