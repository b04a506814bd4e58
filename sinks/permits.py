"""Permits: how many requests of an account may be in flight, taken several at a time."""

from __future__ import annotations

import asyncio
from collections import deque


class Permits:
    """A first-come, first-served count of free places. Belongs to one event loop."""

    def __init__(self, count: int) -> None:
        self.total = count
        self.free = count
        self._waiting: deque[tuple[asyncio.Future[int], int]] = deque()

    @property
    def taken(self) -> int:
        """Places in use."""
        return self.total - self.free

    async def take(self, wanted: int) -> int:
        """Wait until a place is free, then take up to ``wanted``; says how many."""
        if self.free and not self._waiting:
            taken = min(wanted, self.free)
            self.free -= taken
            return taken
        place: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((place, wanted))
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give(place.result())
            raise

    def give(self, count: int) -> None:
        """Give places back."""
        self.free += count
        while self.free and self._waiting:
            place, wanted = self._waiting.popleft()
            if place.done():
                continue
            taken = min(wanted, self.free)
            self.free -= taken
            place.set_result(taken)
