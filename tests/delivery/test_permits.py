"""Permits: never more than there are, none lost, first come first served."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.permits import Permits

NEVER = timedelta(hours=1)


def test_takes_what_is_free_up_to_what_is_wanted() -> None:
    async def story() -> None:
        permits = Permits(10)
        assert await permits.take(4) == 4
        assert await permits.take(100) == 6
        assert permits.taken == 10

    asyncio.run(story())


def test_the_first_who_waits_is_the_first_served() -> None:
    async def story() -> None:
        permits = Permits(2)
        await permits.take(2)
        first = asyncio.create_task(permits.take(1))
        second = asyncio.create_task(permits.take(1))
        await asyncio.sleep(0)
        permits.give(1)
        assert await first == 1
        assert not second.done()
        permits.give(1)
        assert await second == 1

    asyncio.run(story())


def test_whoever_waits_gets_a_quantum_at_once() -> None:
    async def story() -> None:
        permits = Permits(8, quantum=4, patience=NEVER)
        await permits.take(8)
        waiting = asyncio.create_task(permits.take(6))
        modest = asyncio.create_task(permits.take(2))
        await asyncio.sleep(0)
        permits.give(3)
        await asyncio.sleep(0)
        assert not waiting.done()
        permits.give(1)
        assert await waiting == 4
        permits.give(2)
        assert await modest == 2

    asyncio.run(story())


def test_patience_ends_and_one_is_enough() -> None:
    async def story() -> None:
        permits = Permits(8, quantum=4, patience=timedelta(milliseconds=5))
        await permits.take(7)
        assert await asyncio.wait_for(permits.take(6), 5) == 1

    asyncio.run(story())


@pytest.mark.parametrize("served", [False, True])
def test_a_cancelled_wait_loses_no_permit(served: bool) -> None:
    async def story() -> None:
        permits = Permits(2)
        await permits.take(2)
        waiting = asyncio.create_task(permits.take(2))
        await asyncio.sleep(0)
        if served:
            permits.give(2)  # its place is filled, and it is cancelled before it runs
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if not served:
            permits.give(2)
        assert permits.free == 2
        assert await permits.take(2) == 2

    asyncio.run(story())


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.integers(0, 2)), max_size=12),
)
def test_under_any_interleaving(
    count: int, quantum: int, takers: list[tuple[int, bool, int]]
) -> None:
    async def story() -> None:
        permits = Permits(count, quantum, timedelta(0))
        held = 0

        async def taker(wanted: int, kept: int) -> None:
            nonlocal held
            got = await permits.take(wanted)
            held += got
            assert 1 <= got <= wanted
            assert held <= count
            for _ in range(kept):
                await asyncio.sleep(0)
            held -= got
            permits.give(got)

        tasks = [asyncio.create_task(taker(wanted, kept)) for wanted, _, kept in takers]
        for task, (_, cancelled, _) in zip(tasks, takers, strict=True):
            await asyncio.sleep(0)
            if cancelled and held == 0:
                task.cancel()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert permits.free == count
        assert [each for each in tasks if not each.cancelled() and each.exception()] == []

    asyncio.run(story())
