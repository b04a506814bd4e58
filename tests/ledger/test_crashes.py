"""What a restarted, restored, stopped or late Redis does to a real writer."""

from __future__ import annotations

import asyncio
import signal
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from schemas.errors import FanfareError, Fenced, LedgerRolledBack, MissingLedger, Unavailable
from schemas.pages import delivery_key
from schemas.reasons import Lane, RunStatus
from sinks import ledger, ledger_upkeep, runs
from sinks.redis_client import check_durability, command, connect, connect_async
from tests.ledger.backends import FAR, LEG, RUN, TENANT, all_shards
from tests.ledger.server import RedisServer
from transforms.ledger import (
    Action,
    Ask,
    Claim,
    Claims,
    LedgerRef,
    Owner,
    RecipientKey,
    Seen,
    Settlement,
    Settlements,
    VerdictKind,
    scopes_of,
)

REF = LedgerRef(TENANT, RUN, LEG, 9)
KEY = delivery_key(9)
SCOPES = scopes_of("email", "offers")
NOBODY = RecipientKey(b"\0" * 8)
FAR_MS = 1 << 45


def ask(ordinal: int, generation: int = 1, attempt: int = 1) -> Ask:
    return Ask(ordinal, generation, attempt, "sendgrid", NOBODY, FAR_MS, FAR_MS)


def prepare(server: RedisServer, count: int = 5000) -> None:
    client = connect(server.url)
    ledger_upkeep.create(client, TENANT, RUN, LEG, all_shards(count), "d1")
    runs.publish(client, TENANT, RUN, 1, RunStatus.RUNNING, None, FAR)
    client.close()


class Writer:
    """One writer of the ledger, one call at a time: the least that delivery does."""

    def __init__(self, client: redis.asyncio.Redis, owner: Owner, seen: Seen) -> None:
        self.client, self.owner, self.seen = client, owner, seen
        self.turn = asyncio.Lock()

    async def claim(self, *asks: Ask) -> Claims:
        async with self.turn:
            while True:
                answer = await ledger.claim(self.client, REF, self.owner, self.seen, SCOPES, asks)
                self.seen = Seen(self.seen.dataset, answer.seq)
                if isinstance(answer, Claims):
                    return answer

    async def settle(self, *settlements: Settlement) -> Settlements:
        async with self.turn:
            while True:
                answer = await ledger.settle(self.client, REF, self.owner, self.seen, settlements)
                self.seen = Seen(self.seen.dataset, answer.seq)
                if isinstance(answer, Settlements):
                    return answer


async def writer(client: redis.asyncio.Redis, seen: Seen | None = None) -> Writer:
    epoch = await ledger.acquire_epoch(client, Lane.PROMOTIONAL, KEY)
    return Writer(
        client, Owner(Lane.PROMOTIONAL, KEY, epoch), seen or await ledger.look(client, REF)
    )


def test_killed_amid_claims_keeps_what_it_acknowledged(own_redis: RedisServer) -> None:
    prepare(own_redis)
    answered: list[int] = []

    async def claim_until_it_dies() -> Seen:
        client = connect_async(own_redis.url, timedelta(seconds=5))
        mine = await writer(client)
        killer = threading.Timer(0.3, own_redis.kill)
        killer.start()
        at = 0
        try:
            while at < 5000:
                batch = [ask(i) for i in range(at, min(at + 2, 5000))]
                verdicts = (await mine.claim(*batch)).verdicts
                assert {each.kind for each in verdicts} == {VerdictKind.CLAIMED}
                answered.extend(each.ordinal for each in batch)
                at += 2
        except Unavailable:
            return mine.seen
        finally:
            killer.join()
            await client.aclose()
        pytest.fail("Redis outlived all claims")

    seen = asyncio.run(claim_until_it_dies())
    assert answered
    own_redis.start()
    client = connect(own_redis.url)
    found = ledger_upkeep.list_open(client, REF)
    assert set(answered) <= set(found)
    assert len(found) <= len(answered) + 2, "at most the batch whose answer was lost"
    assert ledger_upkeep.view(client, REF).seq >= seen.seq
    client.close()


def test_same_writer_goes_on_after_a_restart(own_redis: RedisServer) -> None:
    """Scripts are gone (NOSCRIPT), pooled connections are dead, the lost call is repeated."""
    prepare(own_redis)

    async def go() -> None:
        client = connect_async(own_redis.url, timedelta(seconds=2))
        mine = await writer(client)
        await mine.claim(ask(1), ask(2))
        own_redis.kill()
        with pytest.raises(Unavailable):
            await mine.settle(Settlement(1, 1, 1, Action.ACCEPT))
        own_redis.start()
        for _ in range(5):
            try:
                done = await mine.settle(Settlement(1, 1, 1, Action.ACCEPT))
                break
            except Unavailable:
                continue
        assert done.answers[0].kind.value == "done"
        assert (await mine.claim(ask(2))).verdicts[0].kind is VerdictKind.CLAIMED
        command_client = connect(own_redis.url)
        command(command_client, "SCRIPT FLUSH")
        command_client.close()
        assert (await mine.claim(ask(3))).verdicts[0].kind is VerdictKind.CLAIMED
        await client.aclose()

    asyncio.run(go())


def test_stopped_and_continued_carries_each_call_out_once(own_redis: RedisServer) -> None:
    """Calls that timed out lie in sockets' buffers, and are read when Redis goes on."""
    prepare(own_redis)

    async def go() -> None:
        client = connect_async(own_redis.url, timedelta(seconds=0.3))
        mine = await writer(client)
        await mine.claim(ask(0))
        before = mine.seen.seq
        own_redis.signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await mine.claim(ask(1))
        finally:
            own_redis.signal(signal.SIGCONT)
        for _ in range(10):
            try:
                answer = await mine.claim(ask(1))
                break
            except Unavailable:
                continue
        assert answer.verdicts[0].kind is VerdictKind.CLAIMED
        # Of the three twins at most one was carried out, and this call; none comes later.
        assert before + 1 <= answer.seq <= before + 2
        await mine.settle(Settlement(1, 1, 1, Action.RELEASE))
        await asyncio.sleep(0.3)
        assert (await mine.claim(ask(1, 2))).verdicts[0].kind is VerdictKind.CLAIMED
        await client.aclose()

    asyncio.run(go())


def test_restored_empty_is_missing(own_redis: RedisServer) -> None:
    prepare(own_redis)

    async def go() -> None:
        client = connect_async(own_redis.url)
        mine = await writer(client)
        await mine.claim(ask(1))
        await client.disconnect()
        own_redis.restore(None)
        with pytest.raises(MissingLedger):
            await mine.claim(ask(2))
        with pytest.raises(MissingLedger):
            await mine.settle(Settlement(1, 1, 1, Action.ACCEPT))
        with pytest.raises(MissingLedger):
            await writer(client)
        await client.aclose()

    asyncio.run(go())


def test_restored_older_is_rolled_back(own_redis: RedisServer, tmp_path: Path) -> None:
    prepare(own_redis)
    older = tmp_path / "older.aof"

    async def go() -> None:
        client = connect_async(own_redis.url)
        mine = await writer(client)
        await mine.claim(ask(1))
        own_redis.keep(older)
        await mine.claim(ask(2))
        await client.disconnect()
        own_redis.restore(older)
        with pytest.raises(LedgerRolledBack):
            await mine.claim(ask(3))
        with pytest.raises(LedgerRolledBack):
            await mine.settle(Settlement(2, 1, 1, Action.ACCEPT))
        successor = await writer(client, mine.seen)
        with pytest.raises(LedgerRolledBack):
            await successor.claim(ask(3))
        await client.aclose()

    asyncio.run(go())


def test_restored_before_the_epoch_is_rolled_back(own_redis: RedisServer, tmp_path: Path) -> None:
    prepare(own_redis)
    older = tmp_path / "older.aof"

    async def go() -> None:
        client = connect_async(own_redis.url)
        own_redis.keep(older)
        mine = await writer(client)
        await client.disconnect()
        own_redis.restore(older)
        with pytest.raises(LedgerRolledBack):
            await mine.claim(ask(1))
        await client.aclose()

    asyncio.run(go())


def test_lost_bitmap_or_meta_is_never_read_as_untouched(own_redis: RedisServer) -> None:
    prepare(own_redis)

    async def go() -> None:
        client = connect_async(own_redis.url)
        mine = await writer(client)
        plain = connect(own_redis.url)
        key = f"fanfare:{{fd{KEY}}}:ledger:{TENANT}/{RUN}/{LEG}/9:"
        bits = command(plain, "GET", key + "bits")
        command(plain, "DEL", key + "bits")
        with pytest.raises(MissingLedger):
            await mine.claim(ask(1))
        with pytest.raises(FanfareError, match="rebuild"):
            ledger_upkeep.create(plain, TENANT, RUN, LEG, all_shards(5000), "d1")
        command(plain, "SET", key + "bits", bits)
        command(plain, "DEL", key + "meta")
        with pytest.raises(MissingLedger):
            await mine.claim(ask(1))
        with pytest.raises(FanfareError, match="rebuild"):
            ledger_upkeep.create(plain, TENANT, RUN, LEG, all_shards(5000), "d1")
        plain.close()
        await client.aclose()

    asyncio.run(go())


def test_predecessor_that_still_runs_is_fenced(own_redis: RedisServer) -> None:
    prepare(own_redis)

    async def go() -> None:
        client = connect_async(own_redis.url)
        old = await writer(client)
        await old.claim(ask(1), ask(2))
        new = await writer(client, old.seen)
        with pytest.raises(Fenced):
            await old.claim(ask(3))
        verdicts = (await new.claim(ask(1), ask(3))).verdicts
        assert [each.kind for each in verdicts] == [VerdictKind.HELD, VerdictKind.CLAIMED]
        with pytest.raises(Fenced):
            await old.settle(Settlement(2, 1, 1, Action.RELEASE))
        plain = connect(own_redis.url)
        assert isinstance(ledger_upkeep.list_open(plain, REF)[2], Claim)
        plain.close()
        await client.aclose()

    asyncio.run(go())


def test_concurrent_calls_of_one_writer_take_turns(own_redis: RedisServer) -> None:
    prepare(own_redis)

    async def go() -> None:
        client = connect_async(own_redis.url)
        mine = await writer(client)
        first = mine.seen.seq
        answers = await asyncio.gather(*[mine.claim(ask(i), ask(i + 1)) for i in range(0, 200, 2)])
        assert sorted(each.seq for each in answers) == list(range(first + 1, first + 101))
        await client.aclose()

    asyncio.run(go())


def test_unreachable_is_unavailable(own_redis: RedisServer) -> None:
    client = connect(own_redis.url, timedelta(seconds=0.2))
    own_redis.signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable):
            runs.publish(client, TENANT, RUN, 1, RunStatus.PAUSED, None, FAR)
    finally:
        own_redis.signal(signal.SIGCONT)
    own_redis.kill()
    with pytest.raises(Unavailable):
        runs.read(client, TENANT, RUN)
    with pytest.raises(Unavailable):
        ledger_upkeep.create(client, TENANT, RUN, LEG, all_shards(1), "d1")
    client.close()


@pytest.mark.parametrize("why", ["full", "a replica"])
def test_a_server_that_refuses_for_now_is_unavailable(own_redis: RedisServer, why: str) -> None:
    client = connect(own_redis.url)
    ledger_upkeep.create(client, TENANT, RUN, LEG, all_shards(1), "d1")

    async def claims() -> None:
        loop_client = connect_async(own_redis.url)
        mine = await writer(loop_client)
        if why == "full":
            command(client, "CONFIG SET", "maxmemory", "1")
        else:
            command(client, "REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(Unavailable):
            await mine.claim(ask(0))
        await loop_client.aclose()

    asyncio.run(claims())
    with pytest.raises(Unavailable):
        runs.publish(client, TENANT, RUN, 1, RunStatus.PAUSED, None, FAR)
    client.close()


def test_forgetful_servers_are_named(own_redis: RedisServer) -> None:
    client = connect(own_redis.url)
    check_durability(client)
    command(client, "CONFIG SET", "appendfsync", "everysec")
    command(client, "CONFIG SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(FanfareError, match=r"appendfsync is everysec.*allkeys-lru"):
        check_durability(client)
    command(client, "CONFIG SET", "appendonly", "no")
    with pytest.raises(FanfareError, match="appendonly is off"):
        check_durability(client)
    client.close()


def test_opt_outs_are_forgotten_after_twenty_minutes(own_redis: RedisServer) -> None:
    client = connect(own_redis.url)
    ledger_upkeep.opt_out(client, 9, NOBODY, ["email/offers"])
    key = f"fanfare:{{fd{KEY}}}:optouts"
    assert 1_190_000 < command(client, "PTTL", key) <= 1_200_000
    member = NOBODY + b"email/offers"
    old = command(client, "ZSCORE", key, member) - 1_200_001
    command(client, "ZADD", key, old, member)
    prepare(own_redis)

    async def go() -> None:
        aclient = connect_async(own_redis.url)
        mine = await writer(aclient)
        assert (await mine.claim(ask(1))).verdicts[0].kind is VerdictKind.CLAIMED
        await aclient.aclose()

    asyncio.run(go())
    ledger_upkeep.opt_out(client, 9, RecipientKey(b"1" * 8), ["*/*"])
    assert command(client, "ZCARD", key) == 1, "old ones are swept"
    client.close()
