"""Unknowns that a provider's own events settle: what is watched, when to look, what follows. Pure.

A message is *unknown* when its request left and no answer came. Any event that the provider sends
of it (processed, delivered, bounced, opened …) proves that the provider took it: of what it
refused it tells nothing. So an unknown becomes accepted by the first event of its send id.

The event may come before the unknown is told or long after, and of ten million webhooks hardly one
is about an unknown. So webhooks are not asked; unknowns are: each page with unknowns is watched,
and looked after at growing intervals. A look asks the ledger what stands, and the table of events
only for what stands unsettled. An event of a watched message that passes by makes its look due at
once.

What is watched is kept as ``Outcomes`` with nothing but the unknown groups: the state's bytes are
a record that is versioned already. How often a page was looked after is memory only: after a
restart all are looked after anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from schemas.reasons import Outcome, Reason
from schemas.records import EngagementEvent, OutcomeGroup, Outcomes
from transforms.webhooks import parse_ref


@dataclass(frozen=True, slots=True)
class ReconcilePolicy:
    """When unknowns are looked after.

    ``grace``: until the first look; waits double from there up to ``longest``.
    ``patience``: how long after its outcome an unknown is watched. Providers repeat events for a
    day and try to deliver for three (SendGrid's Event Webhook reference, 'deferred'); what is
    silent after a week stays held, and is listed for a person.
    ``messages``: looked after in one look, so that it ends before a barrier waits.
    """

    grace: timedelta = timedelta(seconds=2)
    longest: timedelta = timedelta(minutes=5)
    patience: timedelta = timedelta(days=7)
    messages: int = 500

    def wait(self, looks: int) -> timedelta:
        """The wait after so many looks that settled nothing."""
        return min(self.longest, self.grace * float(1 << min(looks, 20)))


@dataclass(frozen=True, slots=True)
class Proof:
    """Why a message counts as accepted."""

    reason: Reason
    """``SETTLED_BY_WEBHOOK`` or, where the ledger had the bit already, ``LEDGER_ACCEPTED``."""
    provider: str = ""
    provider_id: str = ""
    generation: int | None = None
    """Of the order whose request arrived, as it travelled with the message; None: not told."""


def watch_name(tenant: str, run: str, leg: str, shard: int, page: int) -> str:
    """The name of a watched page in state. No two pages share one: names hold no NUL."""
    return "\0".join((tenant, run, leg, str(shard), str(page)))


def name_of(outcomes: Outcomes) -> str:
    """The name of the page that outcomes are about."""
    place = outcomes.shard, outcomes.page
    return watch_name(outcomes.tenant, outcomes.run, outcomes.leg, *place)


def unknowns_of(outcomes: Outcomes) -> Outcomes | None:
    """The outcomes with only their unknown groups; None where there are none."""
    groups = tuple(one for one in outcomes.groups if one.outcome is Outcome.UNKNOWN and one.indexes)
    return replace(outcomes, groups=groups) if groups else None


def indexes_of(watched: Outcomes) -> tuple[int, ...]:
    """The page-relative indexes that are watched, ascending."""
    return tuple(sorted({index for group in watched.groups for index in group.indexes}))


def merged(kept: Outcomes | None, new: Outcomes) -> Outcomes:
    """What is watched of a page after more unknowns: each message once, at its last generation.

    The same in any order of arrival and for any repetition.
    """
    if kept is None:
        return _regrouped(new, new.groups, new.at)
    return _regrouped(new, (*kept.groups, *new.groups), max(kept.at, new.at))


def without(watched: Outcomes, gone: Container[int]) -> Outcomes | None:
    """What is still watched when these indexes are settled; None: nothing."""
    groups = tuple(
        replace(group, indexes=left)
        for group in watched.groups
        if (left := tuple(index for index in group.indexes if index not in gone))
    )
    return replace(watched, groups=groups) if groups else None


def accepted(watched: Outcomes, proofs: Mapping[int, Proof], now: datetime) -> Outcomes:
    """The outcomes that tell everybody: coordinate, caps and the books."""
    gathered: dict[tuple[Reason, str, int], list[tuple[int, str]]] = defaultdict(list)
    for group in watched.groups:
        for index in group.indexes:
            proof = proofs.get(index)
            if proof is None:
                continue
            generation = group.generation if proof.generation is None else proof.generation
            provider = group.provider or proof.provider
            gathered[proof.reason, provider, generation].append((index, proof.provider_id))
    groups = tuple(
        OutcomeGroup(
            Outcome.ACCEPTED,
            reason,
            provider,
            generation,
            tuple(index for index, _ in members),
            tuple(own for _, own in members) if any(own for _, own in members) else (),
        )
        for (reason, provider, generation), members in gathered.items()
    )
    return replace(watched, at=now, groups=groups)


def _regrouped(like: Outcomes, groups: Iterable[OutcomeGroup], at: datetime) -> Outcomes:
    latest: dict[int, OutcomeGroup] = {}
    for group in sorted(groups, key=_identity):
        for index in group.indexes:
            latest[index] = group
    members: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for index in sorted(latest):
        members[_identity(latest[index])].append(index)
    return replace(
        like,
        at=at,
        groups=tuple(
            OutcomeGroup(Outcome.UNKNOWN, Reason(reason), provider, generation, tuple(indexes))
            for (generation, provider, reason), indexes in sorted(members.items())
        ),
    )


def _identity(group: OutcomeGroup) -> tuple[int, str, str]:
    return group.generation, group.provider, group.reason.value


@dataclass(slots=True)
class _Page:
    indexes: frozenset[int]
    due: datetime
    looks: int = 0


@dataclass(slots=True)
class Watch:
    """When to look after which page; of one writer, in memory."""

    policy: ReconcilePolicy
    _pages: dict[str, _Page] = field(default_factory=dict)

    def put(self, name: str, indexes: Iterable[int], now: datetime) -> None:
        """Watch these messages of a page, and look after them soon."""
        self._pages[name] = _Page(frozenset(indexes), now + self.policy.grace)

    def drop(self, name: str) -> None:
        """Watch the page no more."""
        self._pages.pop(name, None)

    def heard(self, event: EngagementEvent, page_size: int, now: datetime) -> None:
        """A provider's event passes by: one of a watched message makes its page's look due."""
        if not self._pages:
            return
        ref = parse_ref(event.ref)
        if ref is None:
            return
        shard, ordinal, _ = ref
        name = watch_name(event.tenant, event.run, event.leg, shard, ordinal // page_size)
        page = self._pages.get(name)
        if page is not None and ordinal % page_size in page.indexes:
            page.due = min(page.due, now)

    def due(self, now: datetime) -> list[str]:
        """Pages to look after now, longest due first, of about ``policy.messages`` messages."""
        waiting = sorted((page.due, name) for name, page in self._pages.items() if page.due <= now)
        chosen: list[str] = []
        messages = 0
        for _, name in waiting:
            if messages >= self.policy.messages:
                break
            chosen.append(name)
            messages += len(self._pages[name].indexes)
        return chosen

    def looked(self, name: str, left: Iterable[int], now: datetime) -> None:
        """A look left these unsettled: wait longer before the next."""
        page = self._pages[name]
        page.indexes = frozenset(left)
        page.looks += 1
        page.due = now + self.policy.wait(page.looks)

    def postpone(self, names: Iterable[str], until: datetime) -> None:
        """A server does not answer: look not before ``until``."""
        for name in names:
            self._pages[name].due = max(self._pages[name].due, until)

    @property
    def soonest(self) -> datetime | None:
        """When the next look is due; None: nothing is watched."""
        return min((page.due for page in self._pages.values()), default=None)

    def __len__(self) -> int:
        return sum(len(page.indexes) for page in self._pages.values())
