"""Shaping on a real Redis: the same answers as the model, and limits that hold by the clock."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from schemas.errors import Unavailable
from schemas.ids import RunId, Tenant
from schemas.reasons import Lane, RunStatus
from schemas.records import Route
from sinks import runs, shaping
from sinks.redis_client import command, connect, connect_async
from sinks.shaping import Limits
from tests.ledger.server import RedisServer
from transforms.shaping import (
    FAILURES,
    JITTER_US,
    SECOND_US,
    Account,
    Circuit,
    Limit,
    RunShape,
    ShapingModel,
    plan,
)

TENANT, RUN = Tenant("acme"), RunId("spring")
ROUTE = Route("sendgrid", "main")
FAR = datetime(2100, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def client(shaping_redis: RedisServer) -> Iterator[redis.Redis]:
    client = connect(shaping_redis.url)
    command(client, "FLUSHALL")
    yield client
    client.close()


def publish(client: redis.Redis, version: int, status: RunStatus, rate: float | None) -> int:
    return runs.publish(client, TENANT, RUN, version, status, rate, FAR)


ACCOUNT = "fanfare:{fshape}:account:sendgrid/main"
_TIMES = {
    "cut": "cut_us",
    "changed": "changed_us",
    "blocked": "blocked_us",
    "window": "window_us",
    "until": "until_us",
}
_FIELDS = _TIMES | {
    "factor": "factor",
    "ok": "ok",
    "failed": "failed",
    "half": "half",
    "probes": "probes",
    "good": "good",
    "cool": "cool_us",
}


class Histories(RuleBasedStateMachine):
    """Redis's clock can't be set: what a script answers says when it was, and the model follows."""

    url: str

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = connect(self.url)
        self.aclient = connect_async(self.url)
        command(self.client, "FLUSHALL")
        self.model = ShapingModel()
        self.version = 0
        self.grants: list[shaping.Grant] = []
        self.publish(RunStatus.RUNNING, 1, 200.0)
        self.names: dict[str, str] = {}

    def teardown(self) -> None:
        self.loop.run_until_complete(self.aclient.aclose())  # type: ignore[attr-defined]
        self.loop.close()
        self.client.close()

    @rule(
        status=st.sampled_from([RunStatus.RUNNING] * 4 + [RunStatus.PAUSED]),
        step=st.integers(0, 2),
        rate=st.sampled_from([None, 3.0, 200.0, 0.5]),
    )
    def publish(self, status: RunStatus, step: int, rate: float | None) -> None:
        self.version += step
        bucket = None if rate is None else plan(Limit(rate))
        ours = self.model.publish("r", RunShape(self.version, status, bucket))
        assert (publish(self.client, self.version, status, rate) == 65) is ours

    @rule(
        n=st.sampled_from([1, 5, 64]),
        lane=st.sampled_from(list(Lane)),
        with_run=st.booleans(),
        limits=st.sampled_from(
            [
                Limits((Limit(500), Limit(20_000, MINUTE)), (Limit(300),), 0.2),
                Limits((Limit(500), Limit(20_000, MINUTE)), (), 0.2),
                Limits(),
            ]
        ),
        pause=st.sampled_from([0.0, 0.0, 0.003, 0.02]),
    )
    def take(self, n: int, lane: Lane, with_run: bool, limits: Limits, pause: float) -> None:
        time.sleep(pause)
        run = RUN if with_run or lane is Lane.PROMOTIONAL else None
        before, factor = dict(self.model.buckets), self.model.accounts.get("a")
        names = [f"account/{limit.period}" for limit in limits.account]
        plans = [plan(limit, limits.reserve) for limit in limits.account]
        planned = [(name, each, True) for name, each in zip(names, plans, strict=True)]
        planned += [(f"tenant/{each.period}", plan(each), False) for each in limits.tenant]
        theirs, now_us = self.loop.run_until_complete(
            shaping.take_at(self.aclient, n, lane, ROUTE, limits, TENANT, run)
        )
        ours = self.model.take(n, lane, "a", planned, "r" if run else None, now_us)
        assert (theirs.granted, theirs.wait_ms, theirs.status) == (
            ours.granted, ours.wait_ms, ours.status
        ), (before, factor)  # fmt: skip
        assert (theirs.circuit, theirs.open_until_ms) == (ours.circuit, ours.open_until_ms)
        assert list(theirs.serials.values()) == list(ours.serials.values())
        self.names.update(zip(theirs.serials, ours.serials, strict=True))
        if theirs.granted:
            self.grants.append(theirs)

    @rule(latest=st.booleans(), share=st.sampled_from([0.0, 0.5, 1.0]))
    def put_back(self, latest: bool, share: float) -> None:
        if not self.grants:
            return
        grant = self.grants[-1 if latest else 0]
        n = int(grant.granted * share)
        theirs = self.loop.run_until_complete(shaping.put_back(self.aclient, n, grant))
        serials = {self.names[key]: at for key, at in grant.serials.items()}
        assert theirs == (self.model.put_back(n, serials) if n else 0)

    @rule(
        ok=st.sampled_from([0, 1, 2, 30]),
        failed=st.sampled_from([0, 0, 1, FAILURES]),
        retry_ms=st.sampled_from([None, None, None, 0, 700]),
    )
    def report(self, ok: int, failed: int, retry_ms: int | None) -> None:
        after = None if retry_ms is None else timedelta(milliseconds=retry_ms)
        theirs, now_us = self.loop.run_until_complete(
            shaping.report_at(self.aclient, ROUTE, ok, failed, after)
        )
        retry_us = None if retry_ms is None else retry_ms * 1000
        ours = self.model.report("a", ok, failed, retry_us, now_us)
        assert theirs.factor == pytest.approx(ours.factor, abs=1e-6)
        assert (theirs.circuit is Circuit.CLOSED) is (ours.until_us == 0)
        assert (theirs.circuit is Circuit.HALF_OPEN) is (ours.half and ours.until_us != 0)

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        """All times that either side keeps move into the past alike."""
        us = int(seconds * SECOND_US)
        account = self.model.accounts.get("a")
        if account:
            older = {name: max(0, getattr(account, name) - us) for name in _TIMES.values()}
            self.model.accounts["a"] = replace(account, **older)
            for field, name in _TIMES.items():
                if command(self.client, "HEXISTS", ACCOUNT, field):
                    command(self.client, "HSET", ACCOUNT, field, older[name])
        for name, bucket in self.model.buckets.items():
            self.model.buckets[name] = replace(bucket, at_us=bucket.at_us - us)
        for key in command(self.client, "KEYS", "fanfare:{fshape}:bucket:*"):
            tokens, at_us, serial = struct.unpack(">ddd", command(self.client, "GET", key))
            older_ = struct.pack(">ddd", tokens, at_us - us, serial)
            command(self.client, "SET", key, older_)

    @invariant()
    def same_account(self) -> None:
        ours = self.model.accounts.get("a", Account())
        theirs: dict[bytes, bytes] = command(self.client, "HGETALL", ACCOUNT)
        for field, name in _FIELDS.items():
            found = theirs.get(field.encode())
            if found is not None or getattr(ours, name) != getattr(Account(), name):
                assert found is not None, field
                assert float(found) == pytest.approx(float(getattr(ours, name))), field


def test_redis_answers_as_the_model(shaping_redis: RedisServer) -> None:
    run_state_machine_as_test(
        type("RedisHistories", (Histories,), {"url": shaping_redis.url}),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_limit_holds_across_connections_by_the_clock(
    client: redis.Redis, shaping_redis: RedisServer
) -> None:
    publish(client, 1, RunStatus.RUNNING, 300.0)

    async def go() -> list[tuple[int, int]]:
        aclient = connect_async(shaping_redis.url)
        grants: list[tuple[int, int]] = []
        end = time.monotonic() + 2.5

        async def worker() -> None:
            while time.monotonic() < end:
                grant, now_us = await shaping.take_at(
                    aclient, 16, Lane.PROMOTIONAL, ROUTE, Limits((Limit(1000),)), TENANT, RUN
                )
                grants.append((now_us, grant.granted))
                await asyncio.sleep(grant.wait_ms / 1000)

        await asyncio.gather(*[worker() for _ in range(6)])
        await aclient.aclose()
        return sorted(grants)

    grants = asyncio.run(go())
    for at, _ in grants:
        inside = sum(n for when, n in grants if at <= when < at + 1_000_000 + JITTER_US)
        assert inside <= 300
    assert sum(n for _, n in grants) > 2 * 300 * 0.85, "and most of it is used"


def test_pause_stops_grants_at_once_everywhere(
    client: redis.Redis, shaping_redis: RedisServer
) -> None:
    async def take() -> shaping.Grant:
        aclient = connect_async(shaping_redis.url)
        try:
            return await shaping.take(aclient, 5, Lane.PROMOTIONAL, ROUTE, Limits(), TENANT, RUN)
        finally:
            await aclient.aclose()

    assert asyncio.run(take()).granted == 0, "a run never heard of"
    assert publish(client, 1, RunStatus.RUNNING, None) == 65
    assert asyncio.run(take()).granted == 5
    assert publish(client, 2, RunStatus.PAUSED, None) == 65
    stopped = asyncio.run(take())
    assert (stopped.granted, stopped.status) == (0, RunStatus.PAUSED)
    assert publish(client, 1, RunStatus.RUNNING, None) == 0, "a replayed command"
    assert asyncio.run(take()).granted == 0


def test_broken_off_publication_is_completed_by_repeating_it(client: redis.Redis) -> None:
    publish(client, 1, RunStatus.RUNNING, 5.0)
    publish(client, 2, RunStatus.PAUSED, 5.0)
    for key in (3, 40):
        name = f"fanfare:{{fd{key}}}:run:{TENANT}/{RUN}"
        command(client, "HSET", name, "version", 1, "status", "running")
    assert publish(client, 2, RunStatus.PAUSED, 5.0) == 2
    assert command(client, "HGET", f"fanfare:{{fd3}}:run:{TENANT}/{RUN}", "status") == b"paused"


def test_read_and_forget(client: redis.Redis) -> None:
    assert runs.read(client, TENANT, RUN) is None
    publish(client, 7, RunStatus.RUNNING, 12.5)
    assert runs.read(client, TENANT, RUN) == runs.PublishedRun(7, RunStatus.RUNNING, 12.5, FAR)
    publish(client, 8, RunStatus.PAUSED, None)
    assert runs.read(client, TENANT, RUN) == runs.PublishedRun(8, RunStatus.PAUSED, None, FAR)
    runs.forget(client, TENANT, RUN)
    assert command(client, "DBSIZE") == 0


def test_names_can_not_reach_into_each_other() -> None:
    assert shaping.run_key("a/b", "c") != shaping.run_key("a", "b/c")
    assert "{" not in shaping.run_key("x{fd1}", "r").removeprefix("fanfare:{fshape}")


def test_promotional_tokens_need_a_run(shaping_redis: RedisServer) -> None:
    async def go() -> None:
        aclient = connect_async(shaping_redis.url)
        with pytest.raises(ValueError, match="without one nobody can pause"):
            await shaping.take(aclient, 1, Lane.PROMOTIONAL, ROUTE, Limits(), TENANT, None)
        grant = await shaping.take(aclient, 1, Lane.CRITICAL, ROUTE, Limits(), TENANT, None)
        with pytest.raises(ValueError, match="can't be put back"):
            await shaping.put_back(aclient, 2, grant)
        await aclient.aclose()

    asyncio.run(go())


def test_unreachable_is_unavailable(shaping_redis: RedisServer) -> None:
    async def go() -> None:
        aclient = connect_async("redis://127.0.0.1:1/0", timedelta(seconds=0.5))
        with pytest.raises(Unavailable):
            await shaping.take(aclient, 1, Lane.CRITICAL, ROUTE, Limits(), TENANT, None)
        with pytest.raises(Unavailable):
            await shaping.report(aclient, ROUTE, ok=1)
        await aclient.aclose()

    asyncio.run(go())


def test_throttled_failing_and_probed_account(
    client: redis.Redis, shaping_redis: RedisServer
) -> None:
    """The rare path whole: random histories seldom walk it to its end."""

    async def go() -> None:
        aclient = connect_async(shaping_redis.url)

        async def take(n: int = 9) -> shaping.Grant:
            return await shaping.take(aclient, n, Lane.CRITICAL, ROUTE, Limits(), TENANT, None)

        async def told(ok: int = 0, failed: int = 0) -> Circuit:
            return (await shaping.report(aclient, ROUTE, ok, failed)).circuit

        assert (await take()).granted == 9
        throttled = await shaping.report(aclient, ROUTE, retry_after=timedelta(seconds=30))
        assert throttled.factor == pytest.approx(0.7)
        blocked = await take()
        assert (blocked.granted, blocked.circuit) == (0, Circuit.CLOSED)
        assert 29_000 < blocked.wait_ms <= 30_000
        command(client, "HSET", ACCOUNT, "blocked", 1)

        assert await told(failed=FAILURES - 1) is Circuit.CLOSED
        assert await told(failed=1) is Circuit.OPEN
        for wait_ms, failed in ((5_000, 1), (10_000, 1), (20_000, 0)):
            opened = await take()
            assert (opened.granted, opened.circuit) == (0, Circuit.OPEN)
            assert wait_ms - 1000 < opened.wait_ms <= wait_ms
            assert await told(ok=50) is Circuit.OPEN, "answers from before say nothing"
            command(client, "HSET", ACCOUNT, "until", 1)
            probes = [await take(3), await take(3), await take(3)]
            assert [each.granted for each in probes] == [3, 2, 0]
            assert {each.circuit for each in probes} == {Circuit.HALF_OPEN}
            assert await told(ok=1) is Circuit.HALF_OPEN
            assert await told(ok=1, failed=failed) is (
                Circuit.OPEN if failed else Circuit.HALF_OPEN
            )
        assert await told(ok=1) is Circuit.CLOSED
        assert (await take()).granted == 9
        assert await told(failed=FAILURES) is Circuit.OPEN
        assert (await take()).wait_ms <= 5_000, "and it cools as briefly as at first"
        await aclient.aclose()

    asyncio.run(go())
