"""Ledger and shaping in memory, as delivery's loop calls them; the same contract as Redis's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence, Set
from datetime import timedelta
from typing import TypeVar

from schemas.errors import Unavailable
from schemas.reasons import Lane
from schemas.records import Route
from sinks.shaping import Limits
from transforms.ledger import (
    Ask,
    Claims,
    LedgerModel,
    LedgerRef,
    Moved,
    Owner,
    Seen,
    Settlement,
    Settlements,
    own_key,
)
from transforms.shaping import Grant, ShapingModel, plan

T = TypeVar("T")


class Memory:
    """A server in memory, shared by all who are connected; it may be down or lose answers."""

    def __init__(self) -> None:
        self.ledger = LedgerModel()
        self.shaping = ShapingModel()
        self.down = False
        self.lost_answers = 0
        """So many of the next writing calls are carried out and not answered."""
        self.calls = 0
        self._lock = threading.Lock()

    def call(self, work: Callable[[], T], *, writes: bool = True) -> T:
        with self._lock:
            self.calls += 1
            if self.down:
                raise Unavailable("the memory is down; try again")
            done = work()
            if writes and self.lost_answers:
                self.lost_answers -= 1
                raise Unavailable("the answer was lost; try again")
            return done


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class MemoryLedger:
    """`sinks.redis_ports.RedisLedger` in memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def acquire_epoch(self, lane: Lane, key: int) -> int:
        return self._memory.call(lambda: self._memory.ledger.acquire_epoch(lane, key))

    async def look(self, ref: LedgerRef, owner: Owner) -> Seen:
        own_key(ref, owner)
        return self._memory.call(lambda: self._memory.ledger.look(ref), writes=False)

    async def accepted(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
        return self._memory.call(lambda: self._memory.ledger.accepted(ref, ordinals), writes=False)

    async def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims | Moved:
        return self._memory.call(
            lambda: self._memory.ledger.claim(ref, owner, seen, scopes, asks, now_ms())
        )

    async def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements | Moved:
        return self._memory.call(
            lambda: self._memory.ledger.settle(ref, owner, seen, settlements, now_ms())
        )

    async def close(self) -> None:
        return


class MemoryShaper:
    """`sinks.redis_ports.RedisShaper` in memory."""

    def __init__(self, memory: Memory, limits: dict[Route, Limits]) -> None:
        self._memory = memory
        self._limits = limits

    async def take(self, route: Route, tenant: str, run: str, lane: Lane, wanted: int) -> Grant:
        limits = self._limits.get(route, Limits())
        name = f"{route.provider}/{route.account}"
        plans = [
            (f"account/{name}/{limit.period}", plan(limit, limits.reserve), True)
            for limit in limits.account
        ]
        return self._memory.call(
            lambda: self._memory.shaping.take(
                wanted, lane, name, plans, f"{tenant}/{run}", time.time_ns() // 1000
            )
        )

    async def put_back(self, unused: int, grant: Grant) -> None:
        self._memory.call(lambda: self._memory.shaping.put_back(unused, grant.serials))

    async def report(
        self, route: Route, accepted: int, failed: int, throttled: timedelta | None
    ) -> None:
        name = f"{route.provider}/{route.account}"
        after_us = None if throttled is None else throttled // timedelta(microseconds=1)
        self._memory.call(
            lambda: self._memory.shaping.report(
                name, accepted, failed, after_us, time.time_ns() // 1000
            )
        )

    async def close(self) -> None:
        return
