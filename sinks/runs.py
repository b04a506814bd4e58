"""The status of runs in Redis, where every token and every claim looks first.

Written by coordinate, and by nobody else, to each delivery key and to shaping: 65 hashes
``run:TENANT/RUN`` with version, status, rate_per_second, refill, burst and deadline_ms. Each is set
only if its version is lower, so that a replayed old command undoes nothing, and a publication
that was broken off is completed by repeating it. Absent means stop.

Blocking calls, for Flink threads and the command line; ``Unavailable`` where Redis does not answer
in time, and they may be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from schemas.ids import RunId, Tenant
from schemas.pages import DELIVERY_KEYS
from schemas.reasons import RunStatus
from sinks.ledger_layout import run_name, tag
from sinks.redis_client import Client, command, script, unavailable
from sinks.shaping import run_bucket, run_key
from transforms.shaping import Limit, plan

_PUBLISH = script("publish")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """What Redis knows of a run."""

    version: int
    status: RunStatus
    rate_per_second: float | None
    deadline: datetime


def _keys(tenant: str, run: str) -> list[str]:
    name = run_name(tenant, run)
    keys = [f"{tag(key)}run:{name}" for key in range(DELIVERY_KEYS)]
    # Shaping first: no token is granted any more while the others still learn of a pause.
    return [run_key(tenant, run), *keys]


def publish(
    client: Client,
    tenant: Tenant,
    run: RunId,
    version: int,
    status: RunStatus,
    rate_per_second: float | None,
    deadline: datetime,
) -> int:
    """Set status and rate everywhere; ``None`` is unlimited. Answers where it was newer.

    65 after a new version, 0 for a repeated one. Raises ``Unavailable``: some places may have it.
    """
    rate = "" if rate_per_second is None else repr(float(rate_per_second))
    bucket = plan(Limit(rate_per_second)) if rate_per_second is not None else None
    fields: list[Any] = [version, "status", status.value, "rate_per_second", rate]
    fields += ["refill", repr(bucket.refill_per_us) if bucket else ""]
    fields += ["burst", repr(bucket.burst) if bucket else ""]
    fields += ["deadline_ms", (deadline - _EPOCH) // timedelta(milliseconds=1)]
    with unavailable(f"publish run {tenant}/{run}"):
        answers = _PUBLISH.run_many(client, [((key,), fields) for key in _keys(tenant, run)])
    return sum(answers)


def read(client: Client, tenant: Tenant, run: RunId) -> PublishedRun | None:
    """What shaping knows of a run, or ``None``."""
    with unavailable(f"read run {tenant}/{run}"):
        found: dict[bytes, bytes] = command(client, "HGETALL", run_key(tenant, run))
    if not found:
        return None
    rate = found[b"rate_per_second"]
    return PublishedRun(
        int(found[b"version"]),
        RunStatus(found[b"status"].decode()),
        float(rate) if rate else None,
        _EPOCH + timedelta(milliseconds=int(found[b"deadline_ms"])),
    )


def forget(client: Client, tenant: Tenant, run: RunId) -> None:
    """Remove a run, at the end of its retention: whatever still asks is told to stop."""
    with unavailable(f"forget run {tenant}/{run}"):
        pipe = client.pipeline(transaction=False)
        for key in [*_keys(tenant, run), run_bucket(tenant, run)]:
            pipe.unlink(key)
        pipe.execute()
