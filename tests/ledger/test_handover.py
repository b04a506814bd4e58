"""A key's next loop waits for the one before it, but for no dead one, and for none for ever."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from schemas.errors import Fenced
from schemas.ids import LegId, RunId, Tenant
from schemas.pages import SHARDS, delivery_key
from schemas.reasons import Lane
from sinks import handover, ledger_layout, ledger_upkeep
from sinks.redis_client import connect
from sinks.redis_ports import RedisLedger, connect_ledger
from tests.ledger.server import RedisServer
from transforms.ledger import LedgerRef, Owner

LANE = Lane.PROMOTIONAL
_SOON_S = 0.4


def ledger_at(server: RedisServer) -> RedisLedger:
    return connect_ledger(server.url)


async def taken(ledger: RedisLedger, key: int) -> tuple[int, float]:
    """The epoch, and how long it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    return await ledger.acquire_epoch(LANE, key), loop.time() - began


def test_nobody_is_waited_for_at_first_or_by_oneself(shared_redis: RedisServer) -> None:
    async def main() -> None:
        only = ledger_at(shared_redis)
        for epoch in (1, 2, 3):
            got, waited = await taken(only, 101)
            assert got == epoch
            assert waited < _SOON_S
        await only.close()

    asyncio.run(main())


def test_who_settles_and_ends_leaves_nothing_in_doubt(shared_redis: RedisServer) -> None:
    key = 102

    async def main() -> None:
        old, new = ledger_at(shared_redis), ledger_at(shared_redis)
        first = await old.acquire_epoch(LANE, key)
        waiting = asyncio.ensure_future(taken(new, key))
        await asyncio.sleep(1.0)
        assert not waiting.done(), "the old loop lives"
        await old.close()
        second, waited = await waiting
        assert second == first + 1
        assert 1.0 <= waited < 1.0 + _SOON_S
        await new.close()

    asyncio.run(main())


def test_a_dead_loop_is_waited_for_no_longer_than_its_last_word(shared_redis: RedisServer) -> None:
    async def main() -> None:
        dead, new = ledger_at(shared_redis), ledger_at(shared_redis)
        await dead.acquire_epoch(LANE, 103)
        chore = dead._handover._chore
        assert chore is not None
        chore.cancel()
        _, waited = await taken(new, 103)
        assert waited <= handover.SILENCE.total_seconds() + _SOON_S
        _, again = await taken(new, 103)
        assert again < _SOON_S
        await new.close()
        await dead._client.aclose()

    asyncio.run(main())


def test_who_never_ends_is_fenced(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "PATIENCE", timedelta(seconds=2))
    run = RunId("handover-zombie")
    shard = 5
    key = delivery_key(shard)
    ref = LedgerRef("acme", run, "leg", shard)
    client = connect(shared_redis.url)
    ledger_upkeep.create(client, Tenant("acme"), run, LegId("leg"), (8,) * SHARDS, "set")

    async def main() -> None:
        zombie, new = ledger_at(shared_redis), ledger_at(shared_redis)
        owner = Owner(LANE, key, await zombie.acquire_epoch(LANE, key))
        _, waited = await taken(new, key)
        assert waited >= 2.0, "it lives, beat after beat"
        with pytest.raises(Fenced):
            await zombie.claim(ref, owner, await zombie.look(ref, owner), ("*", "email/*"), [])
        await zombie.close()
        await new.close()

    asyncio.run(main())
    assert client.keys(ledger_layout.life_key("*")) == []
    client.close()
