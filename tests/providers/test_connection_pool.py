from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from sinks.connections import Endpoint, NotSent, Pool, Request, Wire
from tests.providers.conftest import Run
from tests.providers.servers import eventually


class QuietWire(Wire):
    """A wire without a socket."""

    def fresh(self, idle: float) -> bool:
        return self.usable

    def abort(self) -> None:
        self.usable = False

    def bye(self) -> None:
        self.usable = False
        if self.on_gone is not None:
            self.on_gone(self)


class Wanted(Request[QuietWire, int]):
    """A request that goes out, or can't."""

    def __init__(self, seconds: float = 1.0, *, sound: bool = True) -> None:
        self.ends: list[int | Exception] = []
        super().__init__(asyncio.get_running_loop().time() + seconds, self.ends.append)
        self.sound = sound

    async def failure(self) -> str:
        """How it ends, without an answer."""
        await eventually(lambda: bool(self.ends))
        (end,) = self.ends
        return str(end)

    def begin(self, wire: QuietWire) -> bool:
        if not self.sound:
            self.end(ValueError("it can't go out"))
            return False
        self.wire = wire
        return True


def pool_of(size: int) -> tuple[Pool[QuietWire], list[QuietWire]]:
    made: list[QuietWire] = []

    async def connect(until: float) -> QuietWire:
        await asyncio.sleep(0)
        made.append(QuietWire())
        return made[-1]

    return Pool(connect, size, timedelta(seconds=60)), made


async def wired(request: Wanted) -> QuietWire:
    """The wire that a request goes out on."""
    await eventually(lambda: request.wire is not None)
    assert request.wire is not None
    return request.wire


def test_who_waits_goes_out_in_turn_and_who_has_left_is_passed_over(run: Run) -> None:
    async def main() -> None:
        pool, made = pool_of(1)
        wants = [Wanted() for _ in range(4)]
        for each in wants:
            pool.submit(each)
        wire = await wired(wants[0])
        wants[1].cancel()
        pool.give(wire)
        assert [each.wire for each in wants[1:]] == [None, wire, None]
        pool.give(wire)
        assert wants[3].wire is wire and len(made) == 1

    run(main())


def test_who_is_cancelled_while_it_dials_leaves_the_wire_to_others(run: Run) -> None:
    async def main() -> None:
        pool, made = pool_of(1)
        first, second = Wanted(), Wanted()
        pool.submit(first)
        await asyncio.sleep(0)
        first.cancel()
        pool.submit(second)
        assert await wired(second) is made[0]
        assert first.wire is None and made[0].usable

    run(main())


def test_who_is_cancelled_on_a_wire_breaks_it(run: Run) -> None:
    async def main() -> None:
        pool, made = pool_of(1)
        first, second = Wanted(), Wanted()
        pool.submit(first)
        wire = await wired(first)
        first.cancel()
        assert not wire.usable and not first.ends
        pool.give(wire)
        pool.submit(second)
        assert await wired(second) is made[1]

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
        wants = [Wanted() for _ in range(3)]
        for each in wants:
            pool.submit(each)
        for each in wants[:2]:
            assert "connect-failed" in await each.failure()
        await wired(wants[2])

    run(main())


def test_a_wire_that_died_unnoticed_is_replaced(run: Run) -> None:
    async def main() -> None:
        pool, made = pool_of(1)
        first, second, third = Wanted(), Wanted(), Wanted()
        pool.submit(first)
        wire = await wired(first)
        pool.submit(second)
        wire.usable = False
        pool.give(wire)
        assert await wired(second) is made[1]
        pool.give(made[1])
        made[1].usable = False
        pool.submit(third)
        assert await wired(third) is made[2]

    run(main())


def test_thousands_that_can_not_go_out_hold_up_nobody(run: Run) -> None:
    async def main() -> None:
        pool, made = pool_of(1)
        first, last = Wanted(), Wanted()
        pool.submit(first)
        wire = await wired(first)
        bad = [Wanted(sound=False) for _ in range(5_000)]
        for each in (*bad, last):
            pool.submit(each)
        pool.give(wire)
        assert last.wire is wire and all(each.over for each in bad)
        pool.give(wire)
        for each in bad:
            assert isinstance(each.ends[0], ValueError)
        alone = Wanted(sound=False)
        pool.submit(alone)
        assert isinstance(alone.ends[0], ValueError)
        after = Wanted()
        pool.submit(after)
        assert after.wire is wire and len(made) == 1

    run(main())


def test_whoever_finds_no_wire_in_time_fails_by_itself(run: Run) -> None:
    async def main() -> None:
        pool, _ = pool_of(1)
        first = Wanted()
        pool.submit(first)
        wire = await wired(first)
        late, soon, patient = Wanted(0.2), Wanted(0.05), Wanted(5.0)
        for each in (late, soon, patient):
            pool.submit(each)
        assert "queue-timeout" in await soon.failure()
        assert not late.over
        assert "queue-timeout" in await late.failure()
        pool.give(wire)
        assert patient.wire is wire

    run(main())


def test_closing_tells_who_waits_and_who_dials(run: Run) -> None:
    async def main() -> None:
        async def connect(until: float) -> QuietWire:
            await asyncio.sleep(60)
            raise AssertionError("it was closed")

        pool: Pool[QuietWire] = Pool(connect, 1, timedelta(seconds=60))
        dialling, waiting, after = Wanted(), Wanted(), Wanted()
        pool.submit(dialling)
        pool.submit(waiting)
        await asyncio.sleep(0.01)
        await pool.close()
        pool.submit(after)
        for each in (dialling, waiting, after):
            assert "closed" in await each.failure()

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
