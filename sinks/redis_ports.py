"""What the jobs are given of Redis: ledger, shaping, registry and opt-outs, each connected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from datetime import datetime, timedelta

from schemas.ids import LegId, RunId, Tenant
from schemas.reasons import Lane, RunStatus
from schemas.records import Route
from schemas.snapshot import shard_of
from sinks import ledger, ledger_upkeep, runs, shaping
from sinks.accounts import AccountSettings
from sinks.handover import Handover
from sinks.redis_client import AsyncClient, Client, connect, connect_async
from sinks.shaping import Limits
from transforms.ledger import (
    Ask,
    Claims,
    LedgerRef,
    Moved,
    Owner,
    Seen,
    Settlement,
    Settlements,
    recipient_key,
    scope,
)
from transforms.shaping import Grant

_LOOP_TIMEOUT = timedelta(seconds=5)
_FLINK_TIMEOUT = timedelta(seconds=1)
"""Flink's thread waits no longer: what can't be done now is tried again at the next tick."""


class RedisLedger:
    """The ledger as delivery's loop calls it."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._handover = Handover(client)

    async def acquire_epoch(self, lane: Lane, key: int) -> int:
        """The next epoch of a delivery key, once its predecessor has settled or is given up."""
        await self._handover.await_predecessor(lane, key)
        epoch = await ledger.acquire_epoch(self._client, lane, key)
        await self._handover.hold(lane, key)
        return epoch

    async def look(self, ref: LedgerRef, owner: Owner) -> Seen:
        """How far a ledger is."""
        return await ledger.look(self._client, ref)

    async def accepted(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
        """Which of these recipients have the message."""
        return await ledger.accepted(self._client, ref, ordinals)

    async def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims | Moved:
        """Ask for leave to send."""
        return await ledger.claim(self._client, ref, owner, seen, scopes, asks)

    async def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements | Moved:
        """Record what became of claimed requests."""
        return await ledger.settle(self._client, ref, owner, seen, settlements)

    async def close(self) -> None:
        """Let the connections go; a successor need not wait any longer."""
        await self._handover.end()
        await self._client.aclose()


class RedisShaper:
    """The token buckets as delivery's loop calls them."""

    def __init__(self, client: AsyncClient, accounts: Iterable[AccountSettings]) -> None:
        self._client = client
        self._limits = {one.route: one.limits for one in accounts}

    async def take(self, route: Route, tenant: str, run: str, lane: Lane, wanted: int) -> Grant:
        """Take up to ``wanted`` tokens."""
        limits = self._limits.get(route, Limits())
        return await shaping.take(
            self._client, wanted, lane, route, limits, Tenant(tenant), RunId(run)
        )

    async def put_back(self, unused: int, grant: Grant) -> None:
        """Put tokens back with which nothing was sent."""
        await shaping.put_back(self._client, unused, grant)

    async def report(
        self, route: Route, accepted: int, failed: int, throttled: timedelta | None
    ) -> None:
        """What the provider said since the last report."""
        await shaping.report(self._client, route, accepted, failed, throttled)

    async def close(self) -> None:
        """Let the connections go."""
        await self._client.aclose()


class RedisRegistry:
    """What coordinate tells Redis of a run."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def publish(
        self,
        tenant: str,
        run: str,
        version: int,
        status: RunStatus,
        rate_per_second: float | None,
        deadline: datetime,
    ) -> None:
        """Let everybody know the run's status."""
        runs.publish(
            self._client, Tenant(tenant), RunId(run), version, status, rate_per_second, deadline
        )

    def create_ledger(
        self,
        tenant: str,
        run: str,
        legs: Iterable[str],
        shard_counts: tuple[int, ...],
        dataset: str,
    ) -> None:
        """Create the run's ledgers, full length."""
        for leg in legs:
            ledger_upkeep.create(
                self._client, Tenant(tenant), RunId(run), LegId(leg), shard_counts, dataset
            )


class RedisOptOuts:
    """Where decide leaves withdrawals for claims to see."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def opt_out(self, tenant: str, recipient_id: str, channel: str, topic: str) -> None:
        """Remember a withdrawal for longer than any decision is valid."""
        ledger_upkeep.opt_out(
            self._client,
            shard_of(tenant, recipient_id),
            recipient_key(tenant, recipient_id),
            [scope(channel, topic)],
        )

    def opt_in(self, tenant: str, recipient_id: str, channel: str, topic: str) -> None:
        """Forget a withdrawal of exactly this scope: a grant covers it."""
        ledger_upkeep.opt_in(
            self._client,
            shard_of(tenant, recipient_id),
            recipient_key(tenant, recipient_id),
            [scope(channel, topic)],
        )


def connect_ledger(url: str) -> RedisLedger:
    """The ledger at a Redis URL, for an asyncio loop."""
    return RedisLedger(connect_async(url, _LOOP_TIMEOUT))


def connect_shaper(url: str, accounts: Sequence[AccountSettings]) -> RedisShaper:
    """The buckets at a Redis URL, for an asyncio loop."""
    return RedisShaper(connect_async(url, _LOOP_TIMEOUT), accounts)


def connect_registry(url: str) -> RedisRegistry:
    """The run registry at a Redis URL, for a Flink thread."""
    return RedisRegistry(connect(url, _FLINK_TIMEOUT))


def connect_opt_outs(url: str) -> RedisOptOuts:
    """The opt-outs at a Redis URL, for a Flink thread."""
    return RedisOptOuts(connect(url, _FLINK_TIMEOUT))
