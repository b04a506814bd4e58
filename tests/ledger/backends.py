"""The ledger's two implementations behind one face, so that one suite holds both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence, Set
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from schemas.ids import LegId, RunId, Tenant
from schemas.pages import SHARDS
from schemas.reasons import Lane, RunStatus
from sinks import ledger, ledger_upkeep, runs
from sinks.redis_client import command, connect, connect_async
from transforms.ledger import (
    Ask,
    Claims,
    Entry,
    Held,
    LedgerModel,
    LedgerRef,
    LedgerView,
    Matter,
    Moved,
    Owner,
    RecipientKey,
    Seen,
    Settlement,
    Settlements,
)

TENANT, RUN, LEG = Tenant("acme"), RunId("spring"), LegId("email")
FAR = datetime(2100, 1, 1, tzinfo=UTC)
T = TypeVar("T")


class Backend(Protocol):
    def create(self, counts: Sequence[int], dataset: str) -> None: ...
    def drop(self) -> None: ...
    def acquire_epoch(self, lane: Lane, key: int) -> int: ...
    def publish(self, version: int, status: RunStatus) -> bool: ...
    def opt_out(self, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None: ...
    def opt_in(self, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None: ...
    def look(self, ref: LedgerRef) -> Seen: ...
    def view(self, ref: LedgerRef) -> LedgerView: ...
    def list_open(self, ref: LedgerRef) -> Mapping[int, Matter]: ...
    def accepted(self, ref: LedgerRef) -> list[int]: ...
    def accepted_of(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]: ...
    def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims | Moved: ...
    def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements | Moved: ...
    def reconcile(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]: ...
    def settle_by_hand(self, ref: LedgerRef, at: int, held: Held, accepted: bool) -> bool: ...


class ModelBackend:
    def __init__(self, now_ms: int | None = None) -> None:
        self.model = LedgerModel()
        self.now_ms = now_ms

    def now(self) -> int:
        return self.now_ms if self.now_ms is not None else time.time_ns() // 1_000_000

    def create(self, counts: Sequence[int], dataset: str) -> None:
        self.model.create(TENANT, RUN, LEG, counts, dataset)

    def drop(self) -> None:
        self.model.drop(TENANT, RUN, LEG)

    def acquire_epoch(self, lane: Lane, key: int) -> int:
        return self.model.acquire_epoch(lane, key)

    def publish(self, version: int, status: RunStatus) -> bool:
        return self.model.publish(TENANT, RUN, version, status)

    def opt_out(self, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None:
        for each in scopes:
            self.model.opt_out(recipient, each, self.now())

    def opt_in(self, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None:
        for each in scopes:
            self.model.opt_in(recipient, each)

    def look(self, ref: LedgerRef) -> Seen:
        return self.model.look(ref)

    def view(self, ref: LedgerRef) -> LedgerView:
        return self.model.view(ref)

    def list_open(self, ref: LedgerRef) -> Mapping[int, Matter]:
        return self.model.list_open(ref)

    def accepted(self, ref: LedgerRef) -> list[int]:
        entries = self.model.shards[ref].entries
        return sorted(at for at, entry in entries.items() if entry.accepted)

    def accepted_of(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
        return self.model.accepted(ref, ordinals)

    def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims | Moved:
        return self.model.claim(ref, owner, seen, scopes, asks, self.now())

    def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements | Moved:
        return self.model.settle(ref, owner, seen, settlements, self.now())

    def reconcile(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
        return self.model.reconcile(ref, ordinals)

    def settle_by_hand(self, ref: LedgerRef, at: int, held: Held, accepted: bool) -> bool:
        return self.model.settle_by_hand(ref, at, held, accepted)


class RedisBackend:
    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self.client = connect(url)
        self.aclient = connect_async(url)

    def close(self) -> None:
        self.run(self.aclient.aclose())  # type: ignore[attr-defined]
        self._loop.close()
        self.client.close()

    def flush(self) -> None:
        command(self.client, "FLUSHALL")

    def run(self, doing: Coroutine[object, object, T]) -> T:
        return self._loop.run_until_complete(doing)

    def create(self, counts: Sequence[int], dataset: str) -> None:
        ledger_upkeep.create(self.client, TENANT, RUN, LEG, counts, dataset)

    def drop(self) -> None:
        ledger_upkeep.drop(self.client, TENANT, RUN, LEG)

    def acquire_epoch(self, lane: Lane, key: int) -> int:
        return self.run(ledger.acquire_epoch(self.aclient, lane, key))

    def publish(self, version: int, status: RunStatus) -> bool:
        return runs.publish(self.client, TENANT, RUN, version, status, None, FAR) > 0

    def opt_out(self, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None:
        ledger_upkeep.opt_out(self.client, shard, recipient, scopes)

    def opt_in(self, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None:
        ledger_upkeep.opt_in(self.client, shard, recipient, scopes)

    def look(self, ref: LedgerRef) -> Seen:
        return self.run(ledger.look(self.aclient, ref))

    def view(self, ref: LedgerRef) -> LedgerView:
        return ledger_upkeep.view(self.client, ref)

    def list_open(self, ref: LedgerRef) -> Mapping[int, Matter]:
        return ledger_upkeep.list_open(self.client, ref)

    def accepted(self, ref: LedgerRef) -> list[int]:
        return ledger_upkeep.accepted_ordinals(self.client, ref)

    def accepted_of(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
        return self.run(ledger.accepted(self.aclient, ref, ordinals))

    def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims | Moved:
        return self.run(ledger.claim(self.aclient, ref, owner, seen, scopes, asks))

    def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements | Moved:
        return self.run(ledger.settle(self.aclient, ref, owner, seen, settlements))

    def reconcile(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
        return ledger_upkeep.reconcile(self.client, ref, ordinals)

    def settle_by_hand(self, ref: LedgerRef, at: int, held: Held, accepted: bool) -> bool:
        return ledger_upkeep.settle_by_hand(self.client, ref, at, held, accepted)


def all_shards(count: int) -> list[int]:
    return [count] * SHARDS
