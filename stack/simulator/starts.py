"""When requests started: what a test of pause asks the provider."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

RING = 200_000


@dataclass(frozen=True, slots=True)
class StartsAfter:
    """How many requests started after a time; ``complete`` is False if the ring is too short."""

    count: int
    last_ms: int
    complete: bool


class Starts:
    """The last 200,000 request starts, starts per second, and the last start of each run."""

    def __init__(self) -> None:
        self._times = array("q", bytes(8 * RING))
        self._runs = array("i", bytes(4 * RING))
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._next = 0
        self.total = 0
        self._dropped_latest_ms = 0
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._last: list[int] = []
        self._per_second: list[dict[int, int]] = []

    def add(self, run: str, at_ms: int) -> None:
        """Record the start of one request."""
        number = self._numbers.get(run)
        if number is None:
            number = self._numbers[run] = len(self._names)
            self._names.append(run)
            self._last.append(0)
            self._per_second.append({})
        slot = self._next
        if self.total >= RING and self._times[slot] > self._dropped_latest_ms:
            self._dropped_latest_ms = self._times[slot]
        self._times[slot] = at_ms
        self._runs[slot] = number
        self._next = slot + 1 if slot + 1 < RING else 0
        self.total += 1
        if at_ms > self._last[number]:
            self._last[number] = at_ms
        seconds = self._per_second[number]
        second = at_ms // 1000
        seconds[second] = seconds.get(second, 0) + 1

    def after(self, run: str | None, after_ms: int) -> StartsAfter:
        """Starts later than ``after_ms``; of one run, or of all when ``run`` is None."""
        filled = min(self.total, RING)
        complete = after_ms >= self._dropped_latest_ms
        if run is None:
            count = sum(1 for at in self._times[:filled] if at > after_ms)
            return StartsAfter(count, max(self._last, default=0), complete)
        number = self._numbers.get(run)
        if number is None:
            return StartsAfter(0, 0, True)
        last = self._last[number]
        if last <= after_ms:
            return StartsAfter(0, last, True)
        pairs = zip(self._times[:filled], self._runs[:filled], strict=True)
        count = sum(1 for at, of in pairs if of == number and at > after_ms)
        return StartsAfter(count, last, complete)

    def per_second(self, run: str | None) -> dict[int, int]:
        """Starts by epoch second; of one run, or of all when ``run`` is None."""
        if run is not None:
            number = self._numbers.get(run)
            return {} if number is None else dict(self._per_second[number])
        merged: dict[int, int] = {}
        for seconds in self._per_second:
            for second, count in seconds.items():
                merged[second] = merged.get(second, 0) + count
        return merged

    def last_by_run(self) -> dict[str, int]:
        """The time of the last start of each run, epoch ms."""
        return dict(zip(self._names, self._last, strict=True))
