"""The verdict: three independent records against the audience, recipient by recipient.

The provider's record says what arrived; Kafka's outcomes and the ledger say what delivery knows;
ClickHouse says what the books show. Whatever is wrong is laid to the last fault before it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from schemas.reasons import Lane, Outcome
from stack.chaos.evidence import Acceptance, Entry, Evidence, InFlight, Owed, Struck, Told

_OUTCOME_RANK = (Outcome.ACCEPTED, Outcome.UNKNOWN)
_ENTRY_OF = {"accepted": Entry.ACCEPTED, "unknown": Entry.HELD}
_EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class Cost:
    """What one fault, or all of them, cost one lane."""

    lost: int = 0
    duplicates: int = 0
    unflagged: int = 0
    """Duplicates whose outcome does not say that they may be one."""
    unknown: int = 0
    standstill_ms: int = 0
    """The longest time without a request that the provider took."""


@dataclass(frozen=True, slots=True)
class LaneVerdict:
    """All that befell a lane."""

    messages: int
    lost: int
    duplicates: int
    unflagged: int
    unknown: int
    """Messages of which it was ever said that nobody knows."""
    unknown_left: int
    """Of which that is still said: the others were settled by webhooks."""
    failed: int
    in_flight: InFlight
    by_fault: tuple[Cost, ...]
    """Parallel to the faults."""
    before: Cost
    """What happened before the first fault."""

    @property
    def bound(self) -> int:
        """How many messages may be unknown, or on the critical lane sent again."""
        return self.in_flight.slots + self.in_flight.doubtful

    @property
    def standstill_ms(self) -> int:
        """The longest standstill after any fault."""
        return max((cost.standstill_ms for cost in self.by_fault), default=0)


@dataclass(frozen=True, slots=True)
class Findings:
    """The verdict."""

    promotional: LaneVerdict
    critical: LaneVerdict
    disagreements: tuple[str, ...]
    """Examples of what the records contradict each other in; and ``disagreed`` how many."""
    disagreed: int

    @property
    def balanced(self) -> bool:
        """Whether all records say the same, and the books add up."""
        return not self.disagreed

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        calm, urgent = self.promotional, self.critical
        return (
            self.balanced
            and calm.lost == urgent.lost == 0
            and calm.duplicates == 0
            and calm.unknown <= calm.bound
            and urgent.unknown <= urgent.bound
            and urgent.duplicates <= urgent.bound
            and urgent.unflagged == 0
        )


def check(evidence: Evidence, faults: Sequence[Struck]) -> Findings:
    """Compare everything. ``faults`` in the order in which they happened."""
    known = {one.send_id: one for one in evidence.audience}
    arrived: dict[str, list[Acceptance]] = defaultdict(list)
    trouble: list[str] = list(evidence.book_errors)
    for taken in evidence.provider:
        owed = known.get(taken.send_id)
        if owed is None:
            trouble.append(f"the provider has {taken.send_id}, which nobody was owed")
        elif owed.address != taken.address:
            trouble.append(f"{owed.place} was sent to another address")
        arrived[taken.send_id].append(taken)
    lanes = {lane: _Lane(faults, lane) for lane in Lane}
    for owed in evidence.audience:
        taken_of = sorted(arrived.get(owed.send_id, ()), key=lambda one: one.at_ms)
        trouble += lanes[owed.lane].judge(owed, taken_of, evidence)
    for struck in faults:
        for lane, left in struck.left_behind.items():
            # A slot is taken before the claim and given back after its end: else the bound is none.
            if left.claims > left.slots and lane is Lane.PROMOTIONAL:
                trouble.append(
                    f"{struck.fault.name}: {left.claims} claims in {left.slots} request slots"
                )
    return Findings(
        lanes[Lane.PROMOTIONAL].verdict(),
        lanes[Lane.CRITICAL].verdict(),
        tuple(trouble[:_EXAMPLES]),
        len(trouble),
    )


class _Lane:
    """Adds up one lane."""

    def __init__(self, faults: Sequence[Struck], lane: Lane) -> None:
        self._faults = faults
        self._starts = [struck.at_ms for struck in faults]
        self._lane = lane
        self._counts: Counter[str] = Counter()
        self._by_fault: list[Counter[str]] = [Counter() for _ in faults]
        self._before: Counter[str] = Counter()
        self._times: list[int] = []

    def judge(self, owed: Owed, taken: Sequence[Acceptance], evidence: Evidence) -> Iterable[str]:
        """Count one recipient; yields what its records contradict each other in."""
        self._counts["messages"] += owed.wanted
        told = evidence.outcomes.get(owed.place, ())
        entry = evidence.ledger.get(owed.place)
        book = evidence.books.get(owed.place, "pending")
        last = _last_outcome(told)
        self._times += [one.at_ms for one in taken]
        for again in taken[1:]:
            cause = self._cause(taken[0].at_ms, again.at_ms)
            self._add("duplicates", cause)
            if not any(one.flagged for one in told):
                self._add("unflagged", cause)
        doubts = [one.at_ms for one in told if one.outcome is Outcome.UNKNOWN]
        if doubts or entry is Entry.HELD or book == "unknown":
            # A process's death is told of once its successor looks, before sends flow again.
            moment = min(doubts) if doubts else taken[0].at_ms if taken else None
            self._add("unknown", moment)
            self._counts["unknown_left"] += entry is Entry.HELD
        if not owed.wanted:
            if taken:
                yield f"{owed.place} was sent to, and should not have been"
            if last is not None or entry is not None or book != "skipped":
                yield f"{owed.place} should be skipped: ledger {entry}, books {book}, told {last}"
            return
        said = {"unknown", "failed", "expired", "cancelled"}
        named = {book, last.value if last else "", "unknown" if entry is Entry.HELD else ""}
        if not taken and not (named & said and book != "accepted"):
            self._add("lost", min((one.at_ms for one in told), default=None))
        self._counts["failed"] += book in ("failed", "expired", "cancelled")
        if last is None or last.value != book:
            yield f"{owed.place}: outcomes say {last and last.value}, books say {book}"
        if _ENTRY_OF.get(book, Entry.CLOSED) is not entry:
            yield f"{owed.place}: books say {book}, the ledger has {entry and entry.value}"
        if taken and book not in ("accepted", "unknown"):
            yield f"{owed.place}: the provider has it, books say {book}"

    def _add(self, what: str, at_ms: int | None) -> None:
        self._counts[what] += 1
        number = bisect_right(self._starts, at_ms) - 1 if at_ms is not None else -1
        (self._by_fault[number] if number >= 0 else self._before)[what] += 1

    def _cause(self, first_ms: int, again_ms: int) -> int:
        """When that began for which a message came again: the first fault that can be its reason.

        It was not over at the first coming and had begun by the second; another may lie between.
        """
        for struck in self._faults:
            if struck.ended_ms >= first_ms and struck.at_ms <= again_ms:
                return struck.at_ms
        return again_ms

    def verdict(self) -> LaneVerdict:
        """The sums."""
        counts = self._counts
        gaps = standstills(sorted(self._times), self._faults)
        in_flight = sum(
            (struck.left_behind.get(self._lane, InFlight()) for struck in self._faults),
            InFlight(),
        )
        return LaneVerdict(
            counts["messages"],
            counts["lost"],
            counts["duplicates"],
            counts["unflagged"],
            counts["unknown"],
            counts["unknown_left"],
            counts["failed"],
            in_flight,
            tuple(_cost(found, gap) for found, gap in zip(self._by_fault, gaps, strict=True)),
            _cost(self._before, 0),
        )


def _cost(found: Mapping[str, int], standstill_ms: int) -> Cost:
    return Cost(
        found.get("lost", 0),
        found.get("duplicates", 0),
        found.get("unflagged", 0),
        found.get("unknown", 0),
        standstill_ms,
    )


def _last_outcome(told: Iterable[Told]) -> Outcome | None:
    """What counts of several outcomes: accepted, else unknown, else the latest generation's."""
    found = sorted(told, key=lambda one: (one.generation, one.at_ms))
    for outcome in _OUTCOME_RANK:
        if any(one.outcome is outcome for one in found):
            return outcome
    return found[-1].outcome if found else None


def standstills(times: Sequence[int], faults: Sequence[Struck]) -> list[int]:
    """For each fault the longest time without an acceptance from its start until it was over.

    ``times`` are of all acceptances, ascending. One that never ends lasts until the fault ends.
    """
    found = []
    for struck in faults:
        first = bisect_right(times, struck.at_ms)
        past = bisect_right(times, struck.ended_ms)
        edges = [struck.at_ms, *times[first:past], max(struck.ended_ms, struck.at_ms)]
        found.append(max(after - before for before, after in itertools.pairwise(edges)))
    return found
