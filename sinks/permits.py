"""Permits: how many requests of an account may be in flight, taken several at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(slots=True)
class _Place:
    """Somebody who waits."""

    taken: asyncio.Future[int]
    wanted: int
    least: int


class Permits:
    """A first-come, first-served count of free places. Belongs to one event loop.

    Whoever waits is given ``quantum`` places at once if it wants so many: one by one, each freed
    place would cost its own round of shared calls. After ``patience`` one place is enough, so that
    hanging requests can't keep the rest from being used. ``watch`` is told how many are in use
    whenever that changes, before whoever took them goes on.
    """

    def __init__(
        self,
        count: int,
        quantum: int = 1,
        patience: timedelta = timedelta(milliseconds=5),
        watch: Callable[[int], None] | None = None,
    ) -> None:
        self.total = count
        self.free = count
        self._quantum = max(1, min(quantum, count))
        self._patience_s = patience.total_seconds()
        self._watch = watch
        self._waiting: deque[_Place] = deque()

    @property
    def taken(self) -> int:
        """Places in use."""
        return self.total - self.free

    @property
    def room(self) -> int:
        """How many places the next taker may hope for: the free ones, or else a quantum."""
        return max(self.free, self._quantum)

    async def take(self, wanted: int) -> int:
        """Wait until places are free, then take up to ``wanted``; says how many: at least one."""
        least = min(wanted, self._quantum)
        if self.free >= least and not self._waiting:
            taken = min(wanted, self.free)
            self.free -= taken
            self._changed()
            return taken
        loop = asyncio.get_running_loop()
        place = _Place(loop.create_future(), wanted, least)
        self._waiting.append(place)
        timer = loop.call_later(self._patience_s, self._content_with_one, place)
        try:
            return await place.taken
        except asyncio.CancelledError:
            if place.taken.done() and not place.taken.cancelled():
                self.give(place.taken.result())
            raise
        finally:
            timer.cancel()

    def give(self, count: int) -> None:
        """Give places back."""
        self.free += count
        while self._waiting:
            place = self._waiting[0]
            if place.taken.done():
                self._waiting.popleft()
                continue
            if self.free < place.least:
                break
            self._waiting.popleft()
            taken = min(place.wanted, self.free)
            self.free -= taken
            place.taken.set_result(taken)
        self._changed()

    def _changed(self) -> None:
        if self._watch is not None:
            self._watch(self.taken)

    def _content_with_one(self, place: _Place) -> None:
        place.least = 1
        self.give(0)
