"""The books of a run: every recipient of every leg in exactly one class, counted for itself.

A recipient's class is accepted if any generation says so, else unknown if any says so, else that
of the highest generation; where that one ends in a send, a deferral or a stale decision, or where
nothing was said at all, the recipient is pending. All of it is a function of the *set* of steps:
duplicates and order change nothing. ``sinks.books`` computes the same in SQL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from schemas.reasons import Reason, RunStatus
from schemas.tables import EXCLUSIVE_KINDS, FINAL_KINDS, StepKind

PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Step:
    """One row: what was said of one recipient of a leg in one generation."""

    leg: str
    shard: int
    ordinal: int
    generation: int
    kind: StepKind
    reason: str
    rank: int = 0
    """Of ``schemas.tables.step_rank``: which of two rows with one key counts."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A recipient of whom one generation says two final things."""

    leg: str
    shard: int
    ordinal: int
    generation: int
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted, from rows and manifest; ``check`` says whether it adds up.

    Units are messages owed: recipients of the snapshot times legs.
    """

    audience: int
    classes: Mapping[tuple[str, str], int]
    """(class, reason) → recipients, for the final classes."""
    pending: int
    """Ordinals of the manifest without a final row."""
    strangers: int
    """Recipients with rows whose ordinal the snapshot does not have."""
    conflicts: int
    """Recipients and generations with two contradicting final rows."""
    conflict_examples: tuple[Conflict, ...] = ()

    def of(self, kind: StepKind) -> int:
        """Recipients in one class."""
        name = kind.name.lower()
        return sum(n for (one, _), n in self.classes.items() if one == name)

    def reasons(self, kind: StepKind) -> dict[str, int]:
        """Recipients in one class by reason, most first."""
        name = kind.name.lower()
        found = [(reason, n) for (one, reason), n in self.classes.items() if one == name]
        return dict(sorted(found, key=lambda pair: (-pair[1], pair[0])))


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The coordinator's own word: its count of pending at the run's newest event."""

    status: str
    at: datetime
    pending: int
    audience: int
    open: int
    """Recipients of it who are ordered and of whom no outcome is known yet."""


@dataclass(frozen=True, slots=True)
class Lag:
    """How far ClickHouse is behind.

    ``behind`` is the records in Kafka that are not yet taken in, None where that was not asked;
    ``buffered`` those that the job holds; ``newest`` the time of the newest record written and
    ``age`` how long ago that was.
    """

    newest: datetime | None
    age: timedelta | None
    buffered: int
    behind: int | None

    @property
    def caught_up(self) -> bool | None:
        """Whether all that Kafka holds is written; None where nobody can know."""
        return None if self.behind is None else self.behind == 0 and self.buffered == 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the books balance, and all that is wrong with them."""

    balanced: bool
    errors: tuple[str, ...] = field(default=())


def _weight(step: Step) -> tuple[int, int, int]:
    return step.generation, step.kind.value, step.rank


def class_of(steps: Iterable[Step]) -> tuple[str, str]:
    """The class of one recipient and its reason, of all that was ever said of it.

    Pending has no reason. No steps: pending.
    """
    heaviest: dict[StepKind, Step] = {}
    last: Step | None = None
    for step in steps:
        if step.kind in (StepKind.ACCEPTED, StepKind.UNKNOWN):
            known = heaviest.get(step.kind)
            if known is None or _weight(step) > _weight(known):
                heaviest[step.kind] = step
        if last is None or _weight(step) > _weight(last):
            last = step
    decisive = heaviest.get(StepKind.ACCEPTED) or heaviest.get(StepKind.UNKNOWN) or last
    if decisive is None or decisive.kind not in FINAL_KINDS:
        return PENDING, ""
    return decisive.kind.name.lower(), decisive.reason


def count(steps: Iterable[Step], shard_counts: Sequence[int], legs: Sequence[str]) -> Counts:
    """Count the books of a run from its steps and its manifest.

    Args:
        steps: in any order, with any duplicates.
        shard_counts: recipients of each shard of the snapshot.
        legs: the run's legs.
    """
    people: dict[tuple[str, int, int], set[Step]] = {}
    for step in steps:
        people.setdefault((step.leg, step.shard, step.ordinal), set()).add(step)
    classes: Counter[tuple[str, str]] = Counter()
    conflicts: list[Conflict] = []
    final: set[tuple[str, int, int]] = set()
    strangers = 0
    for person, theirs in people.items():
        leg, shard, ordinal = person
        known = leg in legs and shard < len(shard_counts) and ordinal < shard_counts[shard]
        strangers += not known
        found = class_of(theirs)
        if found[0] != PENDING:
            classes[found] += 1
            final.add(person)
        said: dict[int, set[StepKind]] = {}
        for step in theirs:
            # A replayed send of an older generation that finds the accepted bit only echoes it.
            if step.kind in EXCLUSIVE_KINDS and step.reason != Reason.LEDGER_ACCEPTED.value:
                said.setdefault(step.generation, set()).add(step.kind)
        conflicts += [
            Conflict(*person, generation, tuple(sorted(kind.name.lower() for kind in kinds)))
            for generation, kinds in said.items()
            if len(kinds) > 1
        ]
    manifest = {
        (leg, shard, ordinal)
        for leg in legs
        for shard, recipients in enumerate(shard_counts)
        for ordinal in range(recipients)
    }
    conflicts.sort(key=lambda one: (one.leg, one.shard, one.ordinal, one.generation))
    return Counts(
        audience=len(legs) * sum(shard_counts),
        classes=dict(classes),
        pending=len(manifest - final),
        strangers=strangers,
        conflicts=len(conflicts),
        conflict_examples=tuple(conflicts[:10]),
    )


FOLDING_TIME = timedelta(minutes=1)
"""What a decision or an outcome may take until the coordinator has heard of it."""


def comparable(coordinator: Coordinator, newest_step: datetime, caught_up: bool | None) -> bool:
    """Whether the coordinator's count and that of the rows must agree.

    Its count is of a moment, and it hears of an outcome a little later than the outcome's own
    time. So they must agree when ClickHouse has all that Kafka has, and either the coordinator
    says that nothing is pending (then everything final was in Kafka before), or it counted long
    after the newest row, or after it in a run that is paused and has nothing under way.
    """
    if not caught_up:
        return False
    still = coordinator.status == RunStatus.PAUSED.value and coordinator.open == 0
    folding = timedelta(0) if still else FOLDING_TIME
    return coordinator.pending == 0 or newest_step + folding <= coordinator.at


def check(counts: Counts, coordinator: Coordinator | None, must_agree: bool) -> Verdict:
    """Whether the books balance.

    Args:
        counts: what was counted.
        coordinator: the coordinator's own count, if it was ever heard.
        must_agree: the two counts can be compared (see ``comparable``).
    """
    errors: list[str] = []
    counted = sum(counts.classes.values()) + counts.pending
    if counted != counts.audience:
        errors.append(
            f"the classes and pending add up to {counted:,}, the audience is {counts.audience:,}"
        )
    if counts.strangers:
        errors.append(
            f"{counts.strangers:,} recipients have rows, but the snapshot has no such ordinal"
        )
    if counts.conflicts:
        shown = "; ".join(
            f"{one.leg} {one.shard}.{one.ordinal} generation {one.generation}: "
            + " and ".join(one.kinds)
            for one in counts.conflict_examples[:3]
        )
        errors.append(f"{counts.conflicts:,} times two final classes in one generation ({shown})")
    if must_agree and coordinator is not None and coordinator.pending != counts.pending:
        errors.append(
            f"pending is {counts.pending:,} by rows and {coordinator.pending:,} by the coordinator"
        )
    return Verdict(balanced=not errors, errors=tuple(errors))
