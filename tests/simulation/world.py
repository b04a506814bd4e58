"""The world around the decision code: clock, topics, Redis, provider, people, and the truth.

Everything is in memory and moves only when a step of a history says so. What the world knows for
itself (which requests left, what the provider took, which processes were ended in the middle of
what) is the truth that the promises are judged by.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

import transforms.coordinate
from schemas.codec import to_millis
from schemas.errors import Unavailable
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant, run_key
from schemas.pages import bitmap_from
from schemas.reasons import Channel, Lane, RunStatus
from schemas.records import (
    CampaignSpec,
    CapRule,
    Command,
    ConsentChange,
    ConsentStatus,
    LegSpec,
    Outcomes,
    PageResult,
    QuietHours,
    Route,
    Send,
    WhenCapped,
    WhenZoneUnknown,
    WindowKind,
)
from schemas.snapshot import HAS_EMAIL, HAS_PHONE
from transforms.coordinate import CoordinatePolicy
from transforms.delivery import RetryPolicy
from transforms.ledger import LedgerModel, LedgerRef, recipient_key, scope
from transforms.shaping import Limit, RunShape, ShapingModel, plan

PAGE = 2
"""Recipients of a page here: a run of three people has what a run of a million has."""
START = datetime(2026, 3, 10, 19, 30, tzinfo=UTC)
TENANT = Tenant("acme")
SNAPSHOT = SnapshotId("0" * 32)
TOPICS = ("commands", "results", "outcomes", "consent", "sends")
PARTS = 2
Record = Command | PageResult | Outcomes | ConsentChange | Send


@contextmanager
def small_pages() -> Iterator[None]:
    """Let coordinate count pages of ``PAGE`` recipients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms.coordinate, "PAGE_SIZE", PAGE)
        yield


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True)
class Setup:
    """What a history begins with; a function of its seed."""

    seed: int
    counts: tuple[int, ...]
    specs: tuple[CampaignSpec, ...]
    policy: CoordinatePolicy
    transaction: timedelta
    """How long a transaction may live; what is silent for longer than ``policy.silence`` is not
    in one any more."""
    account_rate: float | None
    lane: Lane = Lane.PROMOTIONAL

    @property
    def recipients(self) -> int:
        return sum(self.counts)


def _leg(channel: Channel) -> LegSpec:
    routes = (Route("first", "main"), Route("second", "main"))
    return LegSpec(
        LegId(channel.value), channel, routes, "a@acme.example", "Acme", None, "s", None, "t"
    )


_WINDOWS = (
    (WindowKind.ROLLING, timedelta(hours=1)),
    (WindowKind.ROLLING, timedelta(hours=24)),
    (WindowKind.CALENDAR_DAY, timedelta()),
)


def setup_of(seed: int) -> Setup:
    """Runs over the same few people, with caps that they compete for."""
    rng = random.Random(f"setup {seed}")
    counts = rng.choice(((1,), (2,), (1, 1), (3,), (2, 1), (3, 1), (4,)))
    kind, length = rng.choice(_WINDOWS)
    when = WhenCapped.DROP if rng.random() < 0.35 else WhenCapped.DEFER
    channel = Channel.EMAIL if rng.random() < 0.2 else None
    caps = (CapRule("cap", rng.choice((1, 1, 1, 2)), kind, length, channel, None, when),)
    specs = []
    for number in range(rng.choice((1, 2, 2, 2, 3))):
        both = rng.random() < 0.25
        quiet = rng.random()
        specs.append(
            CampaignSpec(
                tenant=TENANT,
                run=RunId(f"r{number + 1}"),
                campaign=f"c{number + 1}",
                snapshot=SNAPSHOT,
                category="promo",
                topic="offers",
                lane=Lane.PROMOTIONAL,
                legs=tuple(map(_leg, (Channel.EMAIL, Channel.SMS)[: 1 + both])),
                start_at=START + timedelta(minutes=20) if rng.random() < 0.1 else None,
                deadline=START
                + rng.choice((timedelta(minutes=50), timedelta(hours=16), timedelta(days=3))),
                # Quiet at once, in half an hour, or not at all.
                quiet_hours=QuietHours(19 * 60, 21 * 60)
                if quiet < 0.1
                else QuietHours(20 * 60, 8 * 60)
                if quiet < 0.4
                else None,
                when_zone_unknown=WhenZoneUnknown.SKIP,
                fallback_zone=None,
                caps=caps,
                holdout_percent=0.0,
                rate_per_second=rng.choice((None, None, None, 2.0)),
                valid_for=rng.choice((timedelta(minutes=2), timedelta(minutes=10))),
                defaults={},
            )
        )
    silence = rng.choice((timedelta(minutes=3), timedelta(minutes=20)))
    return Setup(
        seed,
        counts,
        tuple(specs),
        CoordinatePolicy(
            window=rng.choice((1, 2, 3, 8)),
            silence=silence,
            closings_per_step=rng.choice((1, 200)),
            progress_interval=timedelta(days=1),
        ),
        silence * 0.75,
        rng.choice((None, None, 3.0)),
    )


@dataclass(frozen=True)
class PageFacts:
    """A page of the snapshot, as decide reads it."""

    recipient_ids: Sequence[str]
    zones: Sequence[str]
    consent_sets: Sequence[frozenset[str]]
    consent_index: Sequence[int]
    flags: Sequence[int]


def page_facts(counts: Sequence[int]) -> dict[tuple[int, int], PageFacts]:
    """The pages of a snapshot in which everybody has consented and can be reached."""
    pages = {}
    for shard, count in enumerate(counts):
        for page in range(-(-count // PAGE)):
            ids = [f"p{shard}{i}" for i in range(page * PAGE, min(count, (page + 1) * PAGE))]
            pages[shard, page] = PageFacts(
                ids,
                ["UTC"] * len(ids),
                (frozenset({"email:*", "sms:*"}),),
                [0] * len(ids),
                [HAS_EMAIL | HAS_PHONE] * len(ids),
            )
    return pages


def person(shard: int, ordinal: int) -> str:
    """The recipient at an ordinal of a shard."""
    return f"p{shard}{ordinal}"


class Topic:
    """Partitions; what is in one is read in order, but they are read each for itself."""

    def __init__(self) -> None:
        self.parts: tuple[list[Record], ...] = tuple([] for _ in range(PARTS))

    def append(self, record: Record, part: int) -> None:
        self.parts[part % PARTS].append(record)


class Redis:
    """Ledger and shaping on one server; ``operations`` orders what was carried out on it."""

    def __init__(self) -> None:
        self.ledger = LedgerModel()
        self.shaping = ShapingModel()

    def copied(self) -> Redis:
        return copy.deepcopy(self)


@dataclass
class Request:
    """A message on its way to the provider."""

    process: object
    """Who sent it, and what they call it."""
    token: object
    run: str
    leg: str
    recipient: str
    ref: LedgerRef
    ordinal: int
    generation: int
    at: datetime
    arrived: bool = False
    refused: bool = False
    answered: bool = False
    """The sender was told something, or is gone."""

    @property
    def message(self) -> tuple[str, str, str]:
        return self.run, self.leg, self.recipient

    def __str__(self) -> str:
        return f"{self.run}/{self.leg} to {self.recipient}, generation {self.generation}"


@dataclass
class Truth:
    """What really happened, whoever knows of it."""

    accepted: dict[tuple[str, str, str], list[Request]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    unknown_bound: int = 0
    """Messages that were between claim and settlement when their process was ended or superseded,
    and requests that got no usable answer."""
    decided: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """Messages that were ever admitted, and in which generation last."""
    stops: dict[str, int] = field(default_factory=dict)
    """The operation by which all of Redis knew that a run does not run; not there while it does."""
    versions: dict[str, tuple[int, RunStatus]] = field(default_factory=dict)
    opted_out: dict[tuple[str, str], tuple[int, datetime]] = field(default_factory=dict)
    """The operation by which Redis knew of a withdrawal, by recipient and scope, and when."""
    grants: dict[str, list[tuple[datetime, int]]] = field(default_factory=dict)
    lost_transactions: int = 0
    opened: dict[str, int] = field(default_factory=dict)
    """The most that was open of a leg, by run, after coordinate's last step."""


class World:
    """All that is not a job."""

    def __init__(self, setup: Setup, trace: bool = False) -> None:
        self.setup = setup
        self.now = START
        self.topics = {name: Topic() for name in TOPICS}
        self.redis = Redis()
        self.real: Redis | None = None
        """The true server, while an empty or old one stands in its place."""
        self.behind: set[LedgerRef] = set()
        """The ledgers that the other one does not have, or has older."""
        self.copy: Redis | None = None
        self.pages = page_facts(setup.counts)
        self.specs = {ObjectId(spec.run.ljust(64, "0")): spec for spec in setup.specs}
        self.network: list[Request] = []
        self.truth = Truth()
        self.faults: Counter[str] = Counter()
        self.steps = 0
        self.progress = 0
        """Grows with whatever may lead further; a drain that sees none lets time pass."""
        self.operations = 0
        self.flakes: list[str] = []
        """How the next calls of coordinate and decide to Redis go wrong."""
        self.commands = 0
        self.dead_letters: list[tuple[str, str, int, int, int]] = []
        self.retry = RetryPolicy(attempts=2)
        self.jitter = random.Random(setup.seed)
        self.trace = trace
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        if self.trace:
            self.lines.append(f"{(self.now - START).total_seconds():>9.1f} s  {line}")

    @property
    def now_ms(self) -> int:
        return to_millis(self.now)

    def pass_time(self, by: timedelta) -> None:
        self.now += by

    # Redis, as coordinate and decide call it

    def _flake(self, what: str) -> str:
        if not self.flakes:
            return ""
        how = self.flakes.pop()
        self.faults[f"redis {how}"] += 1
        self.say(f"redis fails {what}: {how}")
        return how

    def publish(
        self, spec: CampaignSpec, version: int, status: RunStatus, rate: float | None
    ) -> None:
        """As ``sinks.runs.publish``: shaping first, then the ledgers' side."""
        how = self._flake("a publication")
        if how == "unreachable":
            raise Unavailable("publish")
        self.operations += 1
        name = run_key(spec.tenant, spec.run)
        bucket = plan(Limit(rate)) if rate is not None else None
        self.redis.shaping.publish(name, RunShape(version, status, bucket))
        if how == "half done":
            raise Unavailable("publish")
        self.redis.ledger.publish(spec.tenant, spec.run, version, status)
        if version > self.truth.versions.get(spec.run, (-1,))[0]:
            self.truth.versions[spec.run] = version, status
            if status is RunStatus.RUNNING:
                self.truth.stops.pop(spec.run, None)
            else:
                self.truth.stops.setdefault(spec.run, self.operations)
        if how:
            raise Unavailable("publish")
        self.say(f"{spec.run} is published as {status.value}")

    def create_ledger(self, spec: CampaignSpec) -> None:
        how = self._flake("a ledger's creation")
        if how == "unreachable":
            raise Unavailable("create")
        self.operations += 1
        for leg in spec.legs[:1] if how == "half done" else spec.legs:
            self.redis.ledger.create(
                spec.tenant, spec.run, leg.leg, self.setup.counts, f"{spec.run}-made"
            )
        if how:
            raise Unavailable("create")

    def opt_out(self, change: ConsentChange) -> None:
        how = self._flake("an opt-out")
        if how == "unreachable":
            raise Unavailable("opt out")
        self.operations += 1
        key = recipient_key(change.tenant, change.recipient_id)
        named = scope(change.channel, change.topic)
        if change.status is ConsentStatus.GRANTED:
            self.redis.ledger.opt_in(key, named)
            self.truth.opted_out.pop((change.recipient_id, named), None)
        else:
            self.redis.ledger.opt_out(key, named, self.now_ms)
            self.truth.opted_out[change.recipient_id, named] = self.operations, self.now
        if how:
            raise Unavailable("opt out")

    # Redis, wrong

    def keep_copy(self) -> bool:
        if self.real is not None:
            return False
        self.copy = self.redis.copied()
        return True

    def put_in_place(self, other: Redis) -> None:
        behind = {
            ref
            for ref, mine in self.redis.ledger.shards.items()
            if mine.seq > (other.ledger.shards[ref].seq if ref in other.ledger.shards else 0)
        }
        self.real, self.redis, self.behind = self.redis, other, behind
        # A bucket as it was may hold a burst that was taken since.
        self.truth.grants.clear()
        self.progress += 1

    def repair(self) -> bool:
        """Put the true server back, with what was begun and published on the other meanwhile."""
        if self.real is None:
            return False
        other, self.redis, self.real = self.redis, self.real, None
        self.truth.grants.clear()
        for (tenant, run), (version, status) in other.ledger.runs.items():
            self.redis.ledger.publish(tenant, run, version, status)
        for ref, shard in other.ledger.shards.items():
            if ref not in self.behind:
                self.redis.ledger.shards[ref] = shard
        for key, epoch in other.ledger.epochs.items():
            mine = self.redis.ledger.epochs
            mine[key] = max(epoch, mine.get(key, 0))
        for name, shape in other.shaping.runs.items():
            self.redis.shaping.publish(name, shape)
        for each, at in other.ledger.opt_outs.items():
            self.redis.ledger.opt_outs[each] = max(at, self.redis.ledger.opt_outs.get(each, 0))
        self.progress += 1
        return True

    # provider

    def arrive(self, request: Request) -> None:
        """The provider takes the message."""
        request.arrived = True
        taken = self.truth.accepted.setdefault(request.message, [])
        taken.append(request)
        if len(taken) > 1 and self.setup.lane is Lane.PROMOTIONAL:
            raise Violation(
                f"the provider took {request} twice (first generation "
                f"{taken[0].generation}, then {request.generation})"
            )

    # reading

    def spec_of(self, run: str) -> CampaignSpec:
        return next(spec for spec in self.setup.specs if spec.run == run)

    def recipients_in(self, shard: int, page: int, ordinals: bytes) -> list[str]:
        ids = self.pages[shard, page].recipient_ids
        bits = bitmap_from(ordinals)
        return [one for i, one in enumerate(ids) if bits >> i & 1]
