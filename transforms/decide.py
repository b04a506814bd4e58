"""The decision: may this person be sent this message now?

One pure function of a person's state, a campaign and a moment. It stops at the first refusal:

1. erased, suppressed, withdrawn or no consent (``transforms.consent``) - skipped
2. the deadline has come - expired
3. the person is held out of the campaign - skipped
4. the campaign has not started - deferred to its start; it is quiet in the person's zone - deferred
   to the end of the quiet hours. Where that is not before the deadline the person is expired at
   once: a deferral that can only end so would keep the run open and say nothing until then.
5. a frequency cap is reached - skipped, or deferred to when it admits if every rule that refuses
   says so and that is before the deadline
6. there is no address on the leg's channel - skipped

and admits otherwise, with a reservation against the caps. Deferrals end on full minutes, rounded
up: the run keeps them by the minute, and those of a page stay few.

A person whose zone is not known is, where quiet hours are set, skipped or judged in the campaign's
fallback zone (``when_zone_unknown``); calendar caps judge them in that zone, or in UTC.

Deciding an order again on the state that it left is harmless: the same reservation is taken over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import NamedTuple, Protocol
from zoneinfo import ZoneInfo

from schemas import recipient_bytes
from schemas.codec import from_millis, to_millis
from schemas.errors import InvalidCampaign
from schemas.ids import LegId, RecipientId, RunId, Tenant
from schemas.pages import bitmap_bytes, bitmap_from, indexes_of
from schemas.reasons import Channel, Outcome, Reason
from schemas.recipient_bytes import Memory
from schemas.records import (
    CampaignSpec,
    DeferGroup,
    LegSpec,
    Outcomes,
    PageOrder,
    PageResult,
    Send,
    SkipGroup,
    WhenZoneUnknown,
)
from schemas.snapshot import HAS_EMAIL, HAS_PHONE, HAS_PUSH_TOKEN
from schemas.state import RecipientState
from transforms import caps, consent
from transforms.quiet_hours import (
    MINUTE_MS,
    UTC_ZONE,
    quiet_begins_ms,
    quiet_ends_ms,
    zone_named,
)

MAX_VALID_FOR = timedelta(minutes=10)
_LOOK_AGAIN = timedelta(seconds=15)
"""How long a missing snapshot is not asked for, at least."""
_ADDRESS_FLAG = {
    Channel.EMAIL: HAS_EMAIL,
    Channel.SMS: HAS_PHONE,
    Channel.PUSH: HAS_PUSH_TOKEN,
}
_HOLDOUT_STEPS = 1 << 32
States = Callable[[str], bytes | None]
"""A recipient's state by recipient id; None if there is none. The ids are those of one tenant."""


@dataclass(frozen=True, slots=True)
class Person:
    """What a decision needs of a person beside their state: facts of a snapshot page."""

    recipient_id: RecipientId
    zone: str
    """IANA name; empty where unknown."""
    consents: frozenset[str]
    """Items ``channel:topic`` or ``channel:*``."""
    flags: int
    """Which addresses there are, as in ``schemas.snapshot``."""


@dataclass(frozen=True, slots=True)
class Admit:
    """Send; the premises hold until ``valid_until``."""

    valid_until: datetime


@dataclass(frozen=True, slots=True)
class Defer:
    """Decide again at ``until``."""

    until: datetime
    reason: Reason


@dataclass(frozen=True, slots=True)
class Skip:
    """Don't send; with ``expired`` the person counts as expired, not as skipped."""

    reason: Reason
    expired: bool = False


Decision = Admit | Defer | Skip


class PageFacts(Protocol):
    """What a decision reads of a page; ``schemas.snapshot.PageIndex`` has it."""

    @property
    def recipient_ids(self) -> Sequence[str]:
        """In ordinal order."""

    @property
    def zones(self) -> Sequence[str]:
        """IANA zone of each recipient; empty where unknown."""

    @property
    def consent_sets(self) -> Sequence[frozenset[str]]:
        """The distinct sets of the page."""

    @property
    def consent_index(self) -> Sequence[int]:
        """Position in ``consent_sets`` of each recipient."""

    @property
    def flags(self) -> Sequence[int]:
        """Which addresses each recipient has."""


class _Fate(Enum):
    SKIP = 0
    DEFER = 1
    ADMIT = 2


class _Verdict(NamedTuple):
    fate: _Fate
    reason: Reason
    expired: bool
    until_ms: int
    """Of a deferral its end, of an admission ``valid_until``."""
    before_holdout: bool
    """Decided by what comes before the holdout."""


class _Local(NamedTuple):
    """What a zone's clock says of the campaign at one moment."""

    schedule: _Verdict | None
    windows: tuple[caps.Window, ...]
    admitted: _Verdict


def _skip(reason: Reason, expired: bool = False, before_holdout: bool = False) -> _Verdict:
    return _Verdict(_Fate.SKIP, reason, expired, 0, before_holdout)


_EXPIRED = _skip(Reason.DEADLINE, expired=True)
_EXPIRED_FIRST = _skip(Reason.DEADLINE, expired=True, before_holdout=True)
_HELD_OUT = _skip(Reason.HOLDOUT)
_NO_ADDRESS = _skip(Reason.NO_ADDRESS)
_UNKNOWN_ZONE = _skip(Reason.UNKNOWN_ZONE)
_CAPPED = _skip(Reason.FREQUENCY_CAP)
_REFUSED = {
    reason: _skip(reason, before_holdout=True)
    for reason in (
        Reason.ERASED,
        Reason.SUPPRESSED,
        Reason.CONSENT_WITHDRAWN,
        Reason.NO_CONSENT,
    )
}


class _Rules:
    """A leg's rules at one moment, prepared once for all that are decided then."""

    def __init__(self, spec: CampaignSpec, leg: LegSpec, generation: int, now_ms: int) -> None:
        self.spec = spec
        self.run: str = spec.run
        self.leg: str = leg.leg
        self.channel = leg.channel.value
        self.address_flag = _ADDRESS_FLAG[leg.channel]
        self.generation = generation
        self.now_ms = now_ms
        self.deadline_ms = to_millis(spec.deadline)
        self._locals: dict[str, _Local] = {}
        self._holdout_below = round(spec.holdout_percent / 100 * _HOLDOUT_STEPS)
        self._holdout = hashlib.blake2b(
            f"holdout\0{spec.tenant}\0{spec.campaign}\0".encode(), digest_size=4
        )
        self.has_holdout = self._holdout_below > 0

    def held_out(self, recipient_id: str) -> bool:
        """Whether a person is held out: the same people in every run of a campaign."""
        mark = self._holdout.copy()
        mark.update(recipient_id.encode())
        return int.from_bytes(mark.digest(), "big") < self._holdout_below

    def local(self, name: str) -> _Local:
        """The rules in a zone."""
        found = self._locals.get(name)
        if found is None:
            found = self._locals[name] = self._in_zone(name)
        return found

    def _deferred(self, until_ms: int, reason: Reason, too_late: _Verdict) -> _Verdict:
        until_ms = -(-until_ms // MINUTE_MS) * MINUTE_MS
        if until_ms >= self.deadline_ms:
            return too_late
        return _Verdict(_Fate.DEFER, reason, False, until_ms, False)

    def _in_zone(self, name: str) -> _Local:
        spec, now_ms = self.spec, self.now_ms
        known = zone_named(name)
        if known is None and spec.when_zone_unknown is WhenZoneUnknown.ASSUME:
            known = zone_named(spec.fallback_zone or "")
        zone: ZoneInfo = known or UTC_ZONE
        valid_ms = [
            now_ms + min(spec.valid_for, MAX_VALID_FOR) // timedelta(milliseconds=1),
            self.deadline_ms,
        ]
        schedule = None
        if spec.start_at is not None and to_millis(spec.start_at) > now_ms:
            schedule = self._deferred(to_millis(spec.start_at), Reason.SCHEDULE, _EXPIRED)
        elif spec.quiet_hours is not None:
            begins_ms = quiet_begins_ms(spec.quiet_hours, zone, now_ms)
            if begins_ms is None:
                pass
            elif known is None:
                schedule = _UNKNOWN_ZONE
            elif begins_ms <= now_ms:
                ends_ms = quiet_ends_ms(spec.quiet_hours, zone, now_ms)
                schedule = self._deferred(ends_ms, Reason.QUIET_HOURS, _EXPIRED)
            else:
                valid_ms.append(begins_ms)
        windows = caps.windows(spec.caps, self.channel, spec.category, zone, now_ms)
        valid_ms += [window.ends_ms for window in windows if window.ends_ms]
        admitted = _Verdict(_Fate.ADMIT, Reason.PROVIDER_ACCEPTED, False, min(valid_ms), False)
        return _Local(schedule, windows, admitted)

    def judge(self, memory: Memory | None, zone: str, granted: bool, has_address: bool) -> _Verdict:
        """The verdict on a person who is not held out."""
        words = () if memory is None else memory.words
        refused = consent.refusal(words, granted, self.channel, self.spec.topic)
        if refused is not None:
            return _REFUSED[refused]
        if self.now_ms >= self.deadline_ms:
            return _EXPIRED_FIRST
        local = self.local(zone)
        if local.schedule is not None:
            return local.schedule
        if memory is not None and local.windows:
            full = caps.refusal(local.windows, memory.held, self.run, self.leg, self.now_ms)
            if full is not None:
                if full.drops:
                    return _CAPPED
                return self._deferred(full.until_ms, Reason.FREQUENCY_CAP, _CAPPED)
        return local.admitted if has_address else _NO_ADDRESS

    def reserved(self, memory: Memory | None, valid_until_ms: int) -> Memory:
        """A person's memory after the message was admitted."""
        if memory is None:
            memory = recipient_bytes.memory(self.spec.tenant, (), ())
        return memory._replace(
            held=caps.reserve(
                memory.held,
                self.run,
                self.leg,
                self.generation,
                valid_until_ms,
                self.channel,
                self.spec.category,
                self.now_ms,
            )
        )


def leg_of(spec: CampaignSpec, leg: LegId) -> LegSpec:
    """The leg of a campaign. Raises ``InvalidCampaign`` if it has none of this name."""
    for one in spec.legs:
        if one.leg == leg:
            return one
    names = ", ".join(one.leg for one in spec.legs)
    raise InvalidCampaign(f"run {spec.run} of {spec.tenant} has no leg {leg!r}; it has {names}")


def decide_one(
    state: RecipientState | None,
    person: Person,
    spec: CampaignSpec,
    leg: LegId,
    generation: int,
    now: datetime,
) -> tuple[Decision, RecipientState | None]:
    """The decision on one person, and their state after it (the same object if unchanged).

    ``state`` must be of the campaign's tenant; None where nothing is known of the person.

    Raises:
        InvalidCampaign: the campaign has no such leg.
    """
    chosen = leg_of(spec, leg)
    rules = _Rules(spec, chosen, generation, to_millis(now))
    memory = None if state is None else recipient_bytes.from_state(state)
    verdict = rules.judge(
        memory,
        person.zone,
        consent.granted_by_snapshot(person.consents, rules.channel, spec.topic),
        bool(person.flags & rules.address_flag),
    )
    if not verdict.before_holdout and rules.has_holdout and rules.held_out(person.recipient_id):
        verdict = _HELD_OUT
    match verdict.fate:
        case _Fate.SKIP:
            return Skip(verdict.reason, verdict.expired), state
        case _Fate.DEFER:
            return Defer(from_millis(verdict.until_ms), verdict.reason), state
        case _Fate.ADMIT:
            after = rules.reserved(memory, verdict.until_ms)
            return Admit(from_millis(verdict.until_ms)), recipient_bytes.to_state(after)


@dataclass(frozen=True, slots=True)
class PageDecision:
    """What came of an order: ``result`` and ``sends`` to emit, ``states`` to keep."""

    result: PageResult
    sends: tuple[Send, ...]
    states: dict[str, bytes]
    """New states by recipient id; who is not in it keeps their state."""


def decide_page(
    order: PageOrder, spec: CampaignSpec, index: PageFacts, states: States, now: datetime
) -> PageDecision:
    """The decisions on an order's recipients; each is that of ``decide_one``.

    Every ordinal of the order is in exactly one send, skip or deferral of the result; one that the
    page does not have is skipped as ``corrupt_page``. There is a ``Send`` for each ``valid_until``,
    earliest first: one or two a page, since a page is sorted by zone.

    Raises:
        InvalidCampaign: the campaign has no such leg.
        MalformedRecord: a recipient's state does not decode.
    """
    leg = leg_of(spec, order.leg)
    if order.start_at is not None:
        spec = replace(spec, start_at=order.start_at)
    rules = _Rules(spec, leg, order.generation, to_millis(now))
    granted = [
        consent.granted_by_snapshot(one, rules.channel, spec.topic) for one in index.consent_sets
    ]
    ids, zones, flags, consents = (
        index.recipient_ids,
        index.zones,
        index.flags,
        index.consent_index,
    )
    address_flag = rules.address_flag
    held_out = rules.held_out if rules.has_holdout else None
    wanted = indexes_of(bitmap_from(order.ordinals))
    count = len(ids)
    beyond = [i for i in wanted if i >= count]
    if beyond:
        wanted = [i for i in wanted if i < count]

    seen: dict[tuple[bytes | None, str, bool, int], tuple[_Verdict, bytes, list[int]]] = {}
    groups: dict[int, tuple[_Verdict, list[int]]] = {}
    held_out_members: list[int] = []
    updates: dict[str, bytes] = {}
    admit = _Fate.ADMIT
    for i in wanted:
        recipient_id = ids[i]
        data = states(recipient_id)
        key = (data, zones[i], granted[consents[i]], flags[i] & address_flag)
        known = seen.get(key)
        if known is None:
            memory = None if data is None else recipient_bytes.read(data)
            verdict = rules.judge(memory, key[1], key[2], bool(key[3]))
            after = b""
            if verdict.fate is admit:
                after = recipient_bytes.write(rules.reserved(memory, verdict.until_ms))
            group = groups.get(id(verdict))
            if group is None:
                group = groups[id(verdict)] = (verdict, [])
            known = seen[key] = (verdict, after, group[1])
        verdict, after, members = known
        if held_out is not None and not verdict.before_holdout and held_out(recipient_id):
            held_out_members.append(i)
            continue
        members.append(i)
        if after:
            updates[recipient_id] = after
    if held_out_members:
        groups[id(_HELD_OUT)] = (_HELD_OUT, held_out_members)
    return _assemble(order, spec, leg, groups, beyond, updates, now)


def _bitmap(members: Sequence[int]) -> bytes:
    bits = bytearray((max(members) >> 3) + 1)
    for i in members:
        bits[i >> 3] |= 1 << (i & 7)
    return bytes(bits)


def _assemble(
    order: PageOrder,
    spec: CampaignSpec,
    leg: LegSpec,
    groups: dict[int, tuple[_Verdict, list[int]]],
    beyond: list[int],
    updates: dict[str, bytes],
    now: datetime,
) -> PageDecision:
    skips: dict[tuple[Reason, bool], list[int]] = {}
    deferrals: dict[tuple[Reason, int], list[int]] = {}
    admitted: dict[int, list[int]] = {}
    for verdict, members in groups.values():
        if not members:
            continue
        match verdict.fate:
            case _Fate.SKIP:
                skips.setdefault((verdict.reason, verdict.expired), []).extend(members)
            case _Fate.DEFER:
                deferrals.setdefault((verdict.reason, verdict.until_ms), []).extend(members)
            case _Fate.ADMIT:
                admitted.setdefault(verdict.until_ms, []).extend(members)
    if beyond:
        skips.setdefault((Reason.CORRUPT_PAGE, False), []).extend(beyond)
    sends = tuple(
        Send(
            tenant=order.tenant,
            run=order.run,
            leg=order.leg,
            lane=spec.lane,
            channel=leg.channel,
            spec=order.spec,
            snapshot=order.snapshot,
            shard=order.shard,
            page=order.page,
            generation=order.generation,
            ordinals=_bitmap(members),
            decided_at=now,
            valid_until=from_millis(until_ms),
            deadline=spec.deadline,
        )
        for until_ms, members in sorted(admitted.items())
    )
    all_admitted = [i for members in admitted.values() for i in members]
    result = page_result(
        order,
        now,
        _bitmap(all_admitted) if all_admitted else b"",
        tuple(
            SkipGroup(reason, _bitmap(members), expired)
            for (reason, expired), members in sorted(
                skips.items(), key=lambda item: (item[0][0].value, item[0][1])
            )
        ),
        tuple(
            DeferGroup(reason, from_millis(until_ms), _bitmap(members))
            for (reason, until_ms), members in sorted(
                deferrals.items(), key=lambda item: (item[0][1], item[0][0].value)
            )
        ),
    )
    return PageDecision(result, sends, updates)


def page_result(
    order: PageOrder,
    now: datetime,
    sends: bytes,
    skips: tuple[SkipGroup, ...],
    deferrals: tuple[DeferGroup, ...],
) -> PageResult:
    """What is said of an order: whom it sends to, whom it skips and whom it puts off."""
    return PageResult(
        tenant=order.tenant,
        run=order.run,
        leg=order.leg,
        snapshot=order.snapshot,
        shard=order.shard,
        page=order.page,
        generation=order.generation,
        ordered_at=order.ordered_at,
        decided_at=now,
        sends=sends,
        skips=skips,
        deferrals=deferrals,
    )


def skip_page(order: PageOrder, reason: Reason, now: datetime) -> PageResult:
    """The result of an order that can't be decided: all its ordinals are skipped for one reason.

    A run must not wait for ever for people of whom nothing can be read.
    """
    bits = bitmap_from(order.ordinals)
    skips = (SkipGroup(reason, bitmap_bytes(bits)),) if bits else ()
    return page_result(order, now, b"", skips, ())


def defer_page(order: PageOrder, reason: Reason, now: datetime) -> PageResult:
    """The result of an order that can't be decided yet: all its ordinals are put off a little.

    For what somebody may bring back, a snapshot that is gone: its people are decided once it is
    there, and expire with the run's deadline.
    """
    bits = bitmap_from(order.ordinals)
    # At round moments: the coordinator looks at what is due together.
    step_ms = _LOOK_AGAIN // timedelta(milliseconds=1)
    until_ms = -(-to_millis(now + _LOOK_AGAIN) // step_ms) * step_ms
    put_off = DeferGroup(reason, from_millis(until_ms), bitmap_bytes(bits))
    return page_result(order, now, b"", (), (put_off,) if bits else ())


def fold_outcome(
    state: RecipientState | None,
    run: RunId,
    leg: LegId,
    generation: int,
    outcome: Outcome,
    at: datetime,
) -> RecipientState | None:
    """A person's state after an outcome; the same object if nothing changes.

    See ``transforms.caps.resolve``: outcomes may come in any order and any number of times.
    """
    if state is None:
        return None
    memory = recipient_bytes.from_state(state)
    held = caps.resolve(memory.held, run, leg, generation, outcome, to_millis(at))
    if held is memory.held:
        return state
    return recipient_bytes.to_state(memory._replace(held=held))


def fold_page_outcomes(outcomes: Outcomes, index: PageFacts, states: States) -> dict[str, bytes]:
    """New states by recipient id after outcomes of a page; who is not in it keeps their state.

    A recipient in several groups is folded in their order. Indexes that the page does not have
    are left out: the books show them.
    """
    run, leg = outcomes.run, outcomes.leg
    at_ms = to_millis(outcomes.at)
    ids = index.recipient_ids
    count = len(ids)
    updates: dict[str, bytes] = {}
    for group in outcomes.groups:
        seen: dict[bytes, bytes | None] = {}
        for i in group.indexes:
            if i >= count:
                continue
            recipient_id = ids[i]
            data = updates.get(recipient_id) or states(recipient_id)
            if data is None:
                continue
            if data in seen:
                after = seen[data]
            else:
                memory = recipient_bytes.read(data)
                held = caps.resolve(memory.held, run, leg, group.generation, group.outcome, at_ms)
                after = None
                if held is not memory.held:
                    after = recipient_bytes.write(memory._replace(held=held))
                seen[data] = after
            if after is not None:
                updates[recipient_id] = after
    return updates


def state_key(tenant: Tenant, recipient_id: str) -> str:
    """The key of a recipient's state within a shard: two tenants may use one recipient id."""
    return f"{tenant}\0{recipient_id}"
