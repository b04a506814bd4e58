from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from sinks.connections import Endpoint, NotSent, Pool, Wire
from tests.providers.conftest import Run


class QuietWire(Wire):
    """A wire without a socket."""

    def fresh(self, idle: float) -> bool:
        return self.usable

    def abort(self) -> None:
        self.usable = False


def pool_of(size: int) -> tuple[Pool[QuietWire], list[QuietWire]]:
    made: list[QuietWire] = []

    async def connect(until: float) -> QuietWire:
        await asyncio.sleep(0)
        made.append(QuietWire())
        return made[-1]

    return Pool(connect, size, timedelta(seconds=60)), made


def soon() -> float:
    return asyncio.get_running_loop().time() + 1.0


def test_a_wire_handed_to_who_has_just_been_cancelled_is_not_lost(run: Run) -> None:
    async def main() -> None:
        pool, made = pool_of(1)
        wire = await pool.take(soon())
        for usable in (True, False):
            waiter = asyncio.create_task(pool.take(soon()))
            await asyncio.sleep(0)
            wire.usable = usable
            pool.give(wire)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            wire = await pool.take(soon())
        assert len(made) == 2

    run(main())


def test_a_failed_connection_makes_room_for_who_waits(run: Run) -> None:
    async def main() -> None:
        attempts = 0

        async def connect(until: float) -> QuietWire:
            nonlocal attempts
            attempts += 1
            await asyncio.sleep(0.01)
            if attempts < 3:
                raise NotSent("connect-failed")
            return QuietWire()

        pool: Pool[QuietWire] = Pool(connect, 1, timedelta(seconds=60))
        results = await asyncio.gather(
            *(pool.take(soon()) for _ in range(3)), return_exceptions=True
        )
        assert [type(r) for r in results] == [NotSent, NotSent, QuietWire]

    run(main())


def test_a_wire_that_died_on_its_way_to_a_waiter_is_replaced(run: Run) -> None:
    async def main() -> None:
        pool, made = pool_of(1)
        wire = await pool.take(soon())
        waiter = asyncio.create_task(pool.take(soon()))
        await asyncio.sleep(0)
        pool.give(wire)
        wire.usable = False
        assert await waiter is made[1]

    run(main())


def test_a_name_is_looked_up_once_for_all_and_outlives_its_server(
    run: Run,
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        asked: list[str] = []
        failing = False

        async def look_up(host: str, port: int, **_: object) -> list[object]:
            asked.append(host)
            await asyncio.sleep(0.01)
            if failing:
                raise OSError
            return [(0, 0, 0, "", ("127.0.0.1", port)), (0, 0, 0, "", ("10.0.0.1", port))]

        class Loop:
            time = loop.time
            getaddrinfo = staticmethod(look_up)

        endpoint = Endpoint("mail.example", 25, None, allow_private=True)
        answers = await asyncio.gather(*(endpoint._resolve(Loop()) for _ in range(50)))  # type: ignore[arg-type]
        assert answers == [["127.0.0.1", "10.0.0.1"]] * 50
        assert asked == ["mail.example"]
        failing = True
        endpoint._resolved_at -= 3600
        assert await endpoint._resolve(Loop()) == ["127.0.0.1", "10.0.0.1"]  # type: ignore[arg-type]
        assert len(asked) == 2
        strict = Endpoint("mail.example", 25, None, allow_private=False)
        failing = False
        with pytest.raises(NotSent, match="address-not-allowed"):
            await strict._resolve(Loop())  # type: ignore[arg-type]

    run(main())
