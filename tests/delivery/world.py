"""A deployment in small: servers, a snapshot, an engine, and the operator that drives it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipelines.audience import AudienceRequest, BuiltAudience, build_audience
from pipelines.delivery import work_name
from schemas.codec import encode
from schemas.ids import LegId, RunId, Tenant
from schemas.message import Provider
from schemas.pages import PAGE_SIZE, SHARDS, bitmap_bytes, bitmap_of, delivery_key
from schemas.reasons import Channel, Lane, Outcome, Reason, RunStatus
from schemas.records import (
    CampaignSpec,
    ConsentChange,
    DeadLetter,
    LegSpec,
    OutcomeGroup,
    Outcomes,
    Route,
    Send,
    WhenZoneUnknown,
)
from schemas.snapshot import shard_of
from sinks import ledger_upkeep, runs
from sinks.accounts import AccountSettings
from sinks.engine import DeliveryEngine, EnginePolicy
from sinks.redis_client import Client, connect
from sinks.redis_ports import connect_ledger, connect_shaper
from sinks.shaping import Limits
from sinks.store import FileStore
from tests.delivery.ports import Memory, MemoryLedger, MemoryShaper, now_ms
from transforms.delivery import RetryPolicy, ledger_name
from transforms.ledger import LedgerRef, Matter, recipient_key, scope
from transforms.shaping import RunShape

TENANT, LEG = Tenant("acme"), LegId("email")
MAIN, OTHER = Route("fake", "main"), Route("fake", "other")
FAR = datetime(2100, 1, 1, tzinfo=UTC)
BIG, SAME_KEY, OTHER_KEY = 7, 71, 8
"""Shards with people in: a big one, one of the same delivery key, one of another."""
PEOPLE = {BIG: 540, SAME_KEY: 30, OTHER_KEY: 30}
NO_ADDRESS = "has-no-address"
QUICK = RetryPolicy(timedelta(milliseconds=20), timedelta(milliseconds=100), 3)


def build_people(folder: Path) -> tuple[FileStore, BuiltAudience]:
    """A snapshot by the real pipeline."""
    wanted = dict(PEOPLE)
    source = folder / "people.csv"
    number = 0
    with source.open("w", encoding="utf-8") as file:
        print("recipient_id,email,phone,consents,first_name", file=file)
        while any(wanted.values()):
            number += 1
            shard = shard_of(TENANT, f"p{number}")
            if wanted.get(shard):
                wanted[shard] -= 1
                print(f"p{number},p{number}@mail.example,,email:*,N{number}", file=file)
    store = FileStore(folder / "store")
    return store, build_audience(AudienceRequest((source,), TENANT), store)


class Server(Protocol):
    """Redis, or its like in memory."""

    def create(self, run: RunId, counts: list[int], dataset: str = "d1") -> None: ...
    def publish(self, run: RunId, version: int, status: RunStatus, rate: float | None) -> None: ...
    def opt_out(self, recipient: str) -> None: ...
    def open_matters(self, ref: LedgerRef) -> Mapping[int, Matter]: ...
    def accepted(self, ref: LedgerRef) -> int: ...
    def drop(self, run: RunId) -> None: ...
    def ports(self, limits: dict[Route, Limits]) -> tuple[Callable[[], Any], Callable[[], Any]]: ...


class MemoryServer:
    def __init__(self) -> None:
        self.memory = Memory()

    def create(self, run: RunId, counts: list[int], dataset: str = "d1") -> None:
        self.memory.ledger.create(TENANT, run, LEG, counts, dataset)

    def publish(self, run: RunId, version: int, status: RunStatus, rate: float | None) -> None:
        self.memory.ledger.publish(TENANT, run, version, status)
        self.memory.shaping.publish(f"{TENANT}/{run}", RunShape(version, status, None))

    def opt_out(self, recipient: str) -> None:
        key = recipient_key(TENANT, recipient)
        self.memory.ledger.opt_out(key, scope("email", "offers"), now_ms())

    def open_matters(self, ref: LedgerRef) -> Mapping[int, Matter]:
        return self.memory.ledger.list_open(ref)

    def accepted(self, ref: LedgerRef) -> int:
        return self.memory.ledger.view(ref).accepted

    def drop(self, run: RunId) -> None:
        self.memory.ledger.drop(TENANT, run, LEG)

    def ports(self, limits: dict[Route, Limits]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return partial(MemoryLedger, self.memory), partial(MemoryShaper, self.memory, limits)


class RealServer:
    def __init__(self, url: str) -> None:
        self.url = url
        self.client: Client = connect(url)

    def create(self, run: RunId, counts: list[int], dataset: str = "d1") -> None:
        ledger_upkeep.create(self.client, TENANT, run, LEG, counts, dataset)

    def publish(self, run: RunId, version: int, status: RunStatus, rate: float | None) -> None:
        runs.publish(self.client, TENANT, run, version, status, rate, FAR)

    def opt_out(self, recipient: str) -> None:
        key = recipient_key(TENANT, recipient)
        ledger_upkeep.opt_out(
            self.client, shard_of(TENANT, recipient), key, [scope("email", "offers")]
        )

    def open_matters(self, ref: LedgerRef) -> Mapping[int, Matter]:
        return ledger_upkeep.list_open(self.client, ref)

    def accepted(self, ref: LedgerRef) -> int:
        return ledger_upkeep.view(self.client, ref).accepted

    def drop(self, run: RunId) -> None:
        ledger_upkeep.drop(self.client, TENANT, run, LEG)

    def ports(self, limits: dict[Route, Limits]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        accounts = [
            AccountSettings(route, each, 1, lambda: _no_provider())
            for route, each in limits.items()
        ]
        return partial(connect_ledger, self.url), partial(connect_shaper, self.url, accounts)


def _no_provider() -> Provider:
    raise AssertionError("only the limits of this account are asked for")


class Shop:
    """A run with its people, and what it takes to deliver it."""

    def __init__(
        self, store: FileStore, built: BuiltAudience, server: Server, run: str, **spec: Any
    ) -> None:
        self.store = store
        self.built = built
        self.server = server
        self.run = RunId(run)
        self.version = 0
        leg = LegSpec(
            LEG, Channel.EMAIL, (MAIN,), "news@acme.example", "Acme", None,
            "Hello {{ first_name }}", "<p>{{ first_name }}</p>", None,
        )  # fmt: skip
        leg = replace(leg, **spec.pop("leg", {}))
        self.spec = CampaignSpec(
            tenant=TENANT,
            run=self.run,
            campaign="spring",
            snapshot=built.snapshot,
            category="promo",
            topic="offers",
            lane=Lane.PROMOTIONAL,
            legs=(leg,),
            start_at=None,
            deadline=FAR,
            quiet_hours=None,
            when_zone_unknown=WhenZoneUnknown.SKIP,
            fallback_zone=None,
            caps=(),
            holdout_percent=0.0,
            rate_per_second=None,
            valid_for=timedelta(minutes=10),
            defaults={},
        )
        self.spec_id = store.put_object("spec", encode(self.spec))
        counts = [built.manifest.shard_size(shard) for shard in range(SHARDS)]
        server.create(self.run, counts)
        self.publish(RunStatus.RUNNING)

    def publish(self, status: RunStatus, rate: float | None = None) -> None:
        self.version += 1
        self.server.publish(self.run, self.version, status, rate)

    def send(
        self, shard: int = OTHER_KEY, indexes: Iterable[int] = range(30), page: int = 0, **how: Any
    ) -> Send:
        now = datetime.now(UTC)
        one = Send(
            tenant=TENANT,
            run=self.run,
            leg=LEG,
            lane=Lane.PROMOTIONAL,
            channel=Channel.EMAIL,
            spec=self.spec_id,
            snapshot=self.built.snapshot,
            shard=shard,
            page=page,
            generation=1,
            ordinals=bitmap_bytes(bitmap_of(indexes)),
            decided_at=now,
            valid_until=now + timedelta(minutes=5),
            deadline=FAR,
        )
        return replace(one, **how)

    def recipients(self, shard: int, page: int = 0) -> list[str]:
        snapshot = self.store.open_snapshot(self.built.snapshot)
        return snapshot.read_index(shard, page).recipient_ids

    def ledger(self, shard: int = OTHER_KEY) -> LedgerRef:
        return LedgerRef(TENANT, self.run, LEG, shard)

    def matters(self, shard: int = OTHER_KEY) -> Mapping[int, Matter]:
        return self.server.open_matters(self.ledger(shard))

    def engine(
        self,
        *accounts: tuple[Route, Provider, int],
        limits: dict[Route, Limits] | None = None,
        lane: Lane = Lane.PROMOTIONAL,
        timeout: timedelta = timedelta(seconds=20),
        stop_timeout: timedelta = timedelta(seconds=10),
        retry: RetryPolicy = QUICK,
        slots: Path | None = None,
    ) -> DeliveryEngine:
        ledger, shaper = self.server.ports(limits or {})
        policy = EnginePolicy(lane, retry, timeout, stop_timeout, slots=slots)
        return DeliveryEngine(
            policy, ledger, shaper, lambda: list(accounts), partial(FileStore, self.store.root)
        )


class Operator:
    """What Flink's operator does with an engine; its state outlives an engine."""

    def __init__(self) -> None:
        self.sends: dict[str, Send] = {}
        self.marks: dict[str, str] = {}
        self.groups: list[tuple[Outcomes, OutcomeGroup]] = []
        self.letters: list[DeadLetter] = []
        self.consent: list[ConsentChange] = []
        self._taken: set[int] = set()
        self._engine: DeliveryEngine | None = None

    def start(self, engine: DeliveryEngine) -> None:
        """Run the engine from what is owed."""
        self._engine = engine
        self._taken = set()
        engine.start()
        for send in self.sends.values():
            self._submit(send)

    def submit(self, *sends: Send) -> None:
        for send in sends:
            self.sends[work_name(send)] = send
            self._submit(send)

    def _submit(self, send: Send) -> None:
        assert self._engine is not None
        key = delivery_key(send.shard)
        if key not in self._taken:
            self._taken.add(key)
            self._engine.take_over(key)
        self._engine.submit(key, work_name(send), send, self.marks.get(ledger_name(send)))

    def collect(self) -> bool:
        """One beat of all keys; whether anything moves."""
        assert self._engine is not None
        moving = False
        for key in sorted(self._taken):
            collected = self._engine.collect(key)
            moving = moving or collected.moving
            for record in collected.records:
                match record:
                    case Outcomes():
                        self.groups += [(record, group) for group in record.groups]
                    case DeadLetter():
                        self.letters.append(record)
                    case ConsentChange():
                        self.consent.append(record)
            self.marks.update(collected.marks)
            for name in collected.finished:
                del self.sends[name]
        return moving

    def until(self, done: Callable[[], bool], seconds: float = 40.0) -> None:
        """Collect until it is so."""
        limit = time.monotonic() + seconds
        while True:
            self.collect()
            if done():
                return
            if time.monotonic() > limit:
                raise AssertionError(f"not in {seconds} s; so far {self.tally()}")
            time.sleep(0.01)

    def finish(self, seconds: float = 40.0) -> None:
        """Collect until nothing is owed."""
        self.until(lambda: not self.sends, seconds)

    def tally(self) -> Counter[tuple[Outcome, Reason]]:
        found: Counter[tuple[Outcome, Reason]] = Counter()
        for _, group in self.groups:
            found[group.outcome, group.reason] += len(group.indexes)
        return found

    def by_ordinal(self, shard: int = OTHER_KEY) -> dict[int, list[OutcomeGroup]]:
        found: dict[int, list[OutcomeGroup]] = {}
        for record, group in self.groups:
            if record.shard == shard:
                for index in group.indexes:
                    found.setdefault(record.page * PAGE_SIZE + index, []).append(group)
        return found


def accepted(count: int) -> dict[tuple[Outcome, Reason], int]:
    return {(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): count}
