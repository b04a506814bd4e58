"""A ledger told again from the records of what was sent and what became of it. Pure.

What a ledger said of a recipient follows from the sends (decided, so a request may have left) and
the outcomes (emitted only after the ledger had them), whatever their order and repetitions:

    accepted            some outcome says so
    held                some outcome says unknown, and none accepted. A person may have settled it
                        since, to be sent again: nobody can know, so it is held once more
    held in doubt       a send of some generation has neither of these: an outcome stale of the
                        same generation (its claim was refused), or a final refusal of the same or
                        a later one (the ledger refuses the send since)
    closed              else, the final refusal of the highest generation
    nothing             else

Refusals by coordinate (a cancelled or expired run closes what was not sent) are outcomes that the
ledger never had: they carry a generation that no send has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from schemas.codec import to_millis
from schemas.ids import LegId
from schemas.pages import PAGE_SIZE, bitmap_from, bitmap_of, full_bitmap, indexes_of
from schemas.reasons import Outcome, Reason
from schemas.records import OutcomeGroup, Outcomes, Send
from transforms.ledger import NO_EPOCH, Closed, Held

_CLOSING = frozenset({Outcome.FAILED, Outcome.EXPIRED, Outcome.CANCELLED})
_BY_COORDINATE = frozenset({Reason.RUN_CANCELLED, Reason.RUN_EXPIRED})
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(slots=True)
class PageHistory:
    """What was recorded of one page; bitmaps of the page by generation."""

    sends: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    stale: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    accepted: int = 0
    unknown: dict[int, Held] = field(default_factory=dict)
    """By index, of the highest generation."""
    closed: dict[tuple[int, Outcome, Reason], tuple[int, int]] = field(default_factory=dict)
    """Bitmap and last time in milliseconds."""

    def add_send(self, send: Send) -> None:
        """A decided send of the page."""
        self.sends[send.generation] |= bitmap_from(send.ordinals)

    def add_outcome(self, group: OutcomeGroup, at: datetime) -> None:
        """What became of some of its recipients."""
        bits = bitmap_of(group.indexes)
        at_ms = to_millis(at)
        if group.outcome is Outcome.ACCEPTED:
            self.accepted |= bits
        elif group.outcome is Outcome.STALE:
            self.stale[group.generation] |= bits
        elif group.outcome is Outcome.UNKNOWN:
            held = Held(
                NO_EPOCH,
                group.generation,
                max(group.attempts - 1, 0),
                group.provider,
                at_ms,
                group.reason,
            )
            for index in group.indexes:
                known = self.unknown.get(index)
                if known is None or (known.generation, known.at_ms) < (held.generation, at_ms):
                    self.unknown[index] = held
        elif group.outcome in _CLOSING:
            key = group.generation, group.outcome, group.reason
            before, last = self.closed.get(key, (0, 0))
            self.closed[key] = before | bits, max(last, at_ms)

    def entries(self, size: int, now: datetime, all_sent: bool) -> tuple[int, dict[int, Matter]]:
        """Accepted recipients as a bitmap, and the open matters by index.

        ``all_sent``: the records do not reach back to the launch, so whoever has no outcome may
        have been sent to.
        """
        whole = full_bitmap(size)
        accepted = self.accepted & whole
        settled = accepted | bitmap_of(self.unknown)
        refusals = self._refusals(settled)
        sends = dict(self.sends)
        if all_sent:
            sends[0] = whole
        doubt: dict[int, int] = {}
        for generation, sent in sorted(sends.items()):
            bits = sent & whole & ~settled & ~self.stale.get(generation, 0)
            for index in indexes_of(bits):
                refused = refusals.get(index)
                if refused is None or refused.generation < generation:
                    doubt[index] = generation
        matters: dict[int, Matter] = {i: one for i, one in refusals.items() if i < size}
        at_ms = to_millis(now)
        for index, generation in doubt.items():
            matters[index] = Held(NO_EPOCH, generation, 0, "", at_ms, Reason.CLAIM_IN_DOUBT)
        for index, held in self.unknown.items():
            if index < size and not accepted >> index & 1:
                matters[index] = held
        return accepted, matters

    def _refusals(self, settled: int) -> dict[int, Closed]:
        """The ledger's own final refusals, of the highest generation, by index."""
        found: dict[int, Closed] = {}
        in_order = sorted(self.closed.items(), key=lambda item: (item[0][0], item[1][1]))
        for (generation, outcome, reason), (bits, at_ms) in in_order:
            if reason in _BY_COORDINATE:
                bits &= self.sends.get(generation, 0)
            closed = Closed(NO_EPOCH, generation, 0, outcome, reason, at_ms)
            for index in indexes_of(bits & ~settled):
                found[index] = closed
        return found


Matter = Held | Closed


@dataclass(frozen=True, slots=True)
class Told:
    """A ledger of a shard, told again."""

    accepted: bytes
    """As Redis has bitmaps: ordinal 0 is the first byte's highest bit; at full length."""
    matters: Mapping[int, Matter]

    @property
    def accepted_count(self) -> int:
        """How many have the accepted bit."""
        return int.from_bytes(self.accepted, "big").bit_count()


@dataclass(slots=True)
class History:
    """What was recorded of one run."""

    pages: dict[tuple[LegId, int, int], PageHistory] = field(
        default_factory=lambda: defaultdict(PageHistory)
    )

    def add_send(self, send: Send) -> None:
        """A decided send."""
        self.pages[send.leg, send.shard, send.page].add_send(send)

    def add_outcomes(self, outcomes: Outcomes) -> None:
        """What became of recipients."""
        page = self.pages[outcomes.leg, outcomes.shard, outcomes.page]
        for group in outcomes.groups:
            page.add_outcome(group, outcomes.at)

    def ledger(
        self, leg: LegId, shard: int, count: int, now: datetime, all_sent: bool = False
    ) -> Told:
        """The ledger of a shard of ``count`` recipients; see the module."""
        bits = 0
        matters: dict[int, Matter] = {}
        for number in range(-(-count // PAGE_SIZE)):
            page = self.pages.get((leg, shard, number))
            if page is None and not all_sent:
                continue
            first = number * PAGE_SIZE
            size = min(PAGE_SIZE, count - first)
            accepted, found = (page or PageHistory()).entries(size, now, all_sent)
            bits |= accepted << first
            matters |= {first + index: matter for index, matter in found.items()}
        little = bits.to_bytes((count + 7) // 8, "little")
        return Told(little.translate(_MIRRORED), matters)
