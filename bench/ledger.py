"""What the ledger takes of Redis: ``make bench SECTION=ledger``.

A run of ten million recipients, each of whom is claimed and settled through the scripts, in pages'
order and by shards, as delivery does; Redis's own ``used_memory`` before, with claims open, after.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.delivery import redis_server
from schemas.codec import to_millis
from schemas.ids import LegId, RunId, Tenant
from schemas.message import Verdict
from schemas.pages import SHARDS, delivery_key
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from sinks import ledger_upkeep, runs
from sinks.ledger_desk import LARGEST_CALL
from sinks.redis_client import connect
from sinks.redis_ports import RedisLedger, connect_ledger
from transforms.delivery import Next, SettleAction, Tries, settlement_of
from transforms.ledger import Ask, LedgerRef, Moved, Owner, recipient_key, scopes_of

RECIPIENTS = int(os.environ.get("FANFARE_BENCH_LEDGER", "10000000"))
SETTLED = int(os.environ.get("FANFARE_BENCH_LEDGER_SETTLED", "1000000"))
"""How many of them go through the scripts; bits are made for all when a run is launched."""
_WRITERS = 16
"""Ledgers that are written at once: as many as delivery has connections to Redis."""
TENANT, RUN, LEG = Tenant("acme"), RunId("bench"), LegId("email")


async def _settle(ledger: RedisLedger, shards: range, each: int) -> int:
    now = datetime.now(UTC)
    until, deadline = to_millis(now + timedelta(minutes=10)), to_millis(now + timedelta(hours=1))
    scopes = scopes_of("email", "offers")
    done = 0

    async def shard_of(shard: int) -> None:
        nonlocal done
        ref = LedgerRef(TENANT, RUN, LEG, shard)
        key = delivery_key(shard)
        owner = owners[key]
        seen = await ledger.look(ref, owner)
        for begin in range(0, each, LARGEST_CALL):
            ordinals = range(begin, min(each, begin + LARGEST_CALL))
            asks = [
                Ask(n, 0, 0, "smtp:main", recipient_key(TENANT, f"p{n}"), until, deadline)
                for n in ordinals
            ]
            claims = await ledger.claim(ref, owner, seen, scopes, asks)
            if isinstance(claims, Moved):
                raise RuntimeError("somebody else writes this ledger")
            seen = type(seen)(seen.dataset, claims.seq)
            follow = Next(SettleAction.ACCEPTED, Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED)
            ends = [settlement_of(n, 0, Tries(), follow, Verdict.ACCEPTED) for n in ordinals]
            settled = await ledger.settle(ref, owner, seen, ends)
            if isinstance(settled, Moved):
                raise RuntimeError("somebody else writes this ledger")
            seen = type(seen)(seen.dataset, settled.seq)
            done += len(asks)

    owners = {}
    for key in sorted({delivery_key(shard) for shard in shards}):
        epoch = await ledger.acquire_epoch(Lane.PROMOTIONAL, key)
        owners[key] = Owner(Lane.PROMOTIONAL, key, epoch)
    left = iter(shards)

    async def writer() -> None:
        for shard in left:
            await shard_of(shard)

    await asyncio.gather(*(writer() for _ in range(_WRITERS)))
    await ledger.close()
    return done


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    return measure(RECIPIENTS, SETTLED)


def measure(recipients: int, settled_too: int) -> dict[str, float]:
    """A run of so many recipients, of whom so many are claimed and settled."""
    each = recipients // SHARDS
    with (
        tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder,
        redis_server(Path(folder)) as (url, process),
    ):
        client = connect(url)

        def used() -> int:
            memory: Any = client.info("memory")
            return int(memory["used_memory"])

        before = used()
        ledger_upkeep.create(client, TENANT, RUN, LEG, [each] * SHARDS, "bench")
        deadline = datetime.now(UTC) + timedelta(hours=1)
        runs.publish(client, TENANT, RUN, 1, RunStatus.RUNNING, None, deadline)
        made = used() - before
        cpu, began = sum(process.cpu_times()[:2]), time.perf_counter()
        done = asyncio.run(_settle(connect_ledger(url), range(SHARDS), settled_too // SHARDS))
        took = time.perf_counter() - began
        spent = sum(process.cpu_times()[:2]) - cpu
        settled = used() - before
        client.close()
    scale = 10_000_000 / (each * SHARDS)
    return {
        "bytes_per_10m": settled * scale,
        "bytes_per_10m_at_launch": made * scale,
        "settled": done,
        "claims_and_settles_per_s": done / took,
        "redis_cpu_s_per_million": spent / done * 1e6,
    }
