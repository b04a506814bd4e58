"""The records that travel through Kafka and Flink, as frozen dataclasses.

Each class has an Avro schema of the same name in ``schemas/avro``; ``schemas.codec`` converts.
Key, tenant, ids and times are inside the value. Times are aware UTC, to the millisecond.
Nobody's address and no attribute of a person is in any of them: they name people by page and
ordinal, and who needs a person reads the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum

from schemas.errors import MalformedRecord
from schemas.ids import LegId, ObjectId, RecipientId, RunId, SnapshotId, Tenant
from schemas.pages import PAGE_SIZE
from schemas.reasons import Channel, Lane, Outcome, Reason, RunStatus


class WindowKind(Enum):
    """How a frequency cap's window is laid."""

    ROLLING = "rolling"
    """The last ``length`` before now."""
    CALENDAR_DAY = "calendar_day"
    CALENDAR_WEEK = "calendar_week"
    """Monday 00:00 in the recipient's zone."""
    CALENDAR_MONTH = "calendar_month"


class WhenCapped(Enum):
    """What happens to a message that a cap refuses."""

    DROP = "drop"
    DEFER = "defer"


@dataclass(frozen=True, slots=True)
class CapRule:
    """At most ``limit`` messages a person in a window, of a channel, a category, both or any."""

    name: str
    limit: int
    window: WindowKind
    length: timedelta
    """Only for rolling windows; zero otherwise."""
    channel: Channel | None
    category: str | None
    when_capped: WhenCapped


@dataclass(frozen=True, slots=True)
class QuietHours:
    """No message from ``start_minute`` to ``end_minute`` of the recipient's local day.

    Minutes since local midnight; start > end spans midnight; start == end is no quiet time.
    """

    start_minute: int
    end_minute: int


class WhenZoneUnknown(Enum):
    """What happens to a person without a time zone where a rule needs one."""

    SKIP = "skip"
    """Refused with the reason ``unknown_zone``: fails closed."""
    ASSUME = "assume"
    """The campaign's ``fallback_zone`` is taken."""


@dataclass(frozen=True, slots=True)
class Route:
    """A provider and the account there; routes of a leg are tried in order."""

    provider: str
    account: str


@dataclass(frozen=True, slots=True)
class LegSpec:
    """A run on one channel: through whom, from whom, and what."""

    leg: LegId
    channel: Channel
    routes: tuple[Route, ...]
    sender_address: str
    sender_name: str
    reply_to: str | None
    subject: str
    html: str | None
    text: str | None


@dataclass(frozen=True, slots=True)
class CampaignSpec:
    """All that a run needs to know of its campaign; frozen at launch, named by its content."""

    tenant: Tenant
    run: RunId
    campaign: str
    snapshot: SnapshotId
    category: str
    topic: str
    lane: Lane
    legs: tuple[LegSpec, ...]
    start_at: datetime | None
    deadline: datetime
    quiet_hours: QuietHours | None
    when_zone_unknown: WhenZoneUnknown
    fallback_zone: str | None
    caps: tuple[CapRule, ...]
    holdout_percent: float
    rate_per_second: float | None
    valid_for: timedelta
    """How long a decision may be acted upon; at most ten minutes."""
    defaults: Mapping[str, str]
    """Template variables for attributes that a person lacks."""


class CommandKind(Enum):
    """What a producer or an operator may ask of a run."""

    LAUNCH = "launch"
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    SET_RATE = "set_rate"
    REORDER = "reorder"
    """Give named recipients of the run an order of a new generation (a dead letter's replay)."""
    SCHEDULE = "schedule"
    """Begin a run that has not begun at another time; without one, at once."""


@dataclass(frozen=True, slots=True)
class Reorder:
    """Recipients of one page that are to be ordered again."""

    leg: LegId
    shard: int
    page: int
    ordinals: bytes
    """Bitmap of the page."""


@dataclass(frozen=True, slots=True)
class Command:
    """An order to a run. ``command_id`` makes it idempotent."""

    command_id: str
    tenant: Tenant
    run: RunId
    kind: CommandKind
    issued_at: datetime
    issued_by: str
    note: str = ""
    launch: CampaignSpec | None = None
    rate_per_second: float | None = None
    reorders: tuple[Reorder, ...] = ()
    start_at: datetime | None = None
    """Of a schedule."""


class ConsentStatus(Enum):
    """What a consent change says."""

    GRANTED = "granted"
    WITHDRAWN = "withdrawn"
    SUPPRESSED = "suppressed"
    """The address is dead or complained: no consent helps until it is lifted by a grant."""
    ERASED = "erased"
    """The person is to be forgotten; final."""


@dataclass(frozen=True, slots=True)
class ConsentChange:
    """A person's word, or a provider's, on what may be sent to whom."""

    change_id: str
    tenant: Tenant
    recipient_id: RecipientId
    channel: str
    """A channel's name, or ``*``."""
    topic: str
    """A topic's name, or ``*``."""
    status: ConsentStatus
    at: datetime
    source: str


@dataclass(frozen=True, slots=True)
class PageOrder:
    """Coordinate asks decide for these recipients of a page. Stays inside the campaigns job."""

    tenant: Tenant
    run: RunId
    leg: LegId
    spec: ObjectId
    snapshot: SnapshotId
    shard: int
    page: int
    generation: int
    ordinals: bytes
    ordered_at: datetime
    start_at: datetime | None = None
    """When the run begins, where that was changed since its launch."""


@dataclass(frozen=True, slots=True)
class SkipGroup:
    """Recipients refused for one reason; with ``expired`` they count as expired, not skipped."""

    reason: Reason
    ordinals: bytes
    expired: bool = False


@dataclass(frozen=True, slots=True)
class DeferGroup:
    """Recipients to be decided again at ``until``."""

    reason: Reason
    until: datetime
    ordinals: bytes


@dataclass(frozen=True, slots=True)
class PageResult:
    """What decide said of an order: ``sends``, skips and deferrals part its ordinals."""

    tenant: Tenant
    run: RunId
    leg: LegId
    snapshot: SnapshotId
    shard: int
    page: int
    generation: int
    ordered_at: datetime
    decided_at: datetime
    sends: bytes
    skips: tuple[SkipGroup, ...]
    deferrals: tuple[DeferGroup, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Decided recipients of a page, for delivery."""

    tenant: Tenant
    run: RunId
    leg: LegId
    lane: Lane
    channel: Channel
    spec: ObjectId
    snapshot: SnapshotId
    shard: int
    page: int
    generation: int
    ordinals: bytes
    decided_at: datetime
    valid_until: datetime
    deadline: datetime


@dataclass(frozen=True, slots=True)
class OutcomeGroup:
    """Recipients of one page with one outcome, reason and provider."""

    outcome: Outcome
    reason: Reason
    provider: str
    """Empty where no provider was asked."""
    generation: int
    indexes: tuple[int, ...]
    """Page-relative."""
    provider_ids: tuple[str, ...] = ()
    """Parallel to ``indexes``, or empty; an empty string is 'not known'."""
    attempts: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of recipients of one page. At least once, in any order; folding is idempotent."""

    tenant: Tenant
    run: RunId
    leg: LegId
    snapshot: SnapshotId
    shard: int
    page: int
    at: datetime
    groups: tuple[OutcomeGroup, ...]

    def require_sound(self) -> Outcomes:
        """Itself. Raises MalformedRecord where an index is of no page."""
        for group in self.groups:
            if any(not 0 <= index < PAGE_SIZE for index in group.indexes):
                raise MalformedRecord(
                    f"indexes of outcomes are 0 to {PAGE_SIZE - 1}, got {min(group.indexes)} to "
                    f"{max(group.indexes)}"
                )
        return self


@dataclass(frozen=True, slots=True)
class RunEvent:
    """A run changed its state, or a command was refused: the audit trail."""

    event_id: str
    tenant: Tenant
    run: RunId
    campaign: str
    version: int
    status: RunStatus
    at: datetime
    command_id: str
    command: CommandKind | None
    by: str
    accepted: bool
    note: str
    spec: ObjectId | None
    snapshot: SnapshotId | None
    audience: int
    legs: tuple[str, ...]
    pending: int
    """The coordinator's own count of recipients without a final outcome, at ``at``."""
    ordered: int
    open: int
    deferred: int
    shard_counts: tuple[int, ...] = ()
    """Recipients of each shard; only in the event of the launch."""


@dataclass(frozen=True, slots=True)
class RawWebhook:
    """A provider's callback as it arrived, verified and not yet parsed."""

    webhook_id: str
    provider: str
    tenant: Tenant
    received_at: datetime
    headers: Mapping[str, str]
    body: bytes


class EngagementKind(Enum):
    """What a provider tells of a message after it accepted it."""

    PROCESSED = "processed"
    DEFERRED = "deferred"
    DELIVERED = "delivered"
    BOUNCED = "bounced"
    DROPPED = "dropped"
    OPENED = "opened"
    CLICKED = "clicked"
    COMPLAINED = "complained"
    UNSUBSCRIBED = "unsubscribed"


@dataclass(frozen=True, slots=True)
class EngagementEvent:
    """One event of one message, normalised."""

    event_id: str
    tenant: Tenant
    run: RunId
    leg: LegId
    send_id: str
    ref: str
    """``shard.ordinal.generation`` as it travelled in the provider's field; may be empty."""
    kind: EngagementKind
    at: datetime
    provider: str
    provider_message_id: str
    reason: str
    url: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What could not be processed, whole, with why and what a replay needs."""

    letter_id: str
    tenant: str
    run: str
    step: str
    """``operator`` or ``operator/stage`` that gave up."""
    reason: Reason
    detail: str
    source: str
    """Topic or endpoint that it came from."""
    original: bytes
    first_at: datetime
    last_at: datetime
    leg: str = ""
    shard: int = -1
    page: int = -1
    ordinals: bytes = b""
    generation: int = -1
    attributes: Mapping[str, str] = field(default_factory=dict)
