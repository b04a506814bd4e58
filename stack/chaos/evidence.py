"""What a run of chaos leaves to be judged: who was owed what, three records, and the faults.

Plain values. ``stack.chaos.records`` reads them from the servers, tests make them up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from schemas.reasons import Lane, Outcome
from stack.chaos.schedule import Fault

Place: TypeAlias = tuple[str, int, int]
"""A recipient of a run: run, shard, ordinal."""


@dataclass(frozen=True, slots=True)
class Owed:
    """One line of the audience: a message that is owed, or, if not ``wanted``, must not leave."""

    place: Place
    send_id: str
    address: str
    lane: Lane
    wanted: bool


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The provider took a message."""

    send_id: str
    address: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Told:
    """An outcome in Kafka."""

    outcome: Outcome
    generation: int
    at_ms: int
    flagged: bool
    """Whether it says that an earlier request may have arrived as well."""


class Entry(Enum):
    """What the ledger has of a recipient; nothing is no entry."""

    ACCEPTED = "accepted"
    CLAIM = "claim"
    HELD = "held"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is compared."""

    audience: tuple[Owed, ...]
    provider: tuple[Acceptance, ...]
    outcomes: Mapping[Place, tuple[Told, ...]]
    ledger: Mapping[Place, Entry]
    books: Mapping[Place, str]
    """ClickHouse's class of each recipient: a final kind's name, or ``pending``."""
    book_errors: tuple[str, ...] = ()
    """What the books of the runs say themselves: unbalanced, not settled."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """How much was under way in one lane when a delivery process was killed or stopped."""

    slots: int = 0
    """Request slots that the process showed as in use."""
    open: int = 0
    """Requests that the provider had open."""
    claims: int = 0
    """Claims in the ledgers."""
    doubtful: int = 0
    """Requests that the provider hung, reset or answered ambiguously."""

    def __add__(self, other: InFlight) -> InFlight:
        return InFlight(
            self.slots + other.slots,
            self.open + other.open,
            self.claims + other.claims,
            self.doubtful + other.doubtful,
        )


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that happened. Times are epoch milliseconds; ``ended_ms``: sends flowed again."""

    fault: Fault
    at_ms: int
    ended_ms: int
    open_before: int
    """Requests that the provider had open just before."""
    remaining: int
    """Promotional messages of the launched runs that had not left yet."""
    left_behind: Mapping[Lane, InFlight] = field(default_factory=dict)
    note: str = ""
