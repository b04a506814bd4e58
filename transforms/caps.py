"""Frequency caps: how many messages a person gets in a window, whatever is killed when.

A message is a reservation, keyed by run and leg. It is taken when the message is decided and then

==========  ====================================  ==========================================
it is       when                                  it counts
==========  ====================================  ==========================================
open        its outcome is not known              in every window, whatever its age
settled     accepted or unknown, any generation   in the windows that its ``at`` lies in
refunded    failed, expired, cancelled or stale   nowhere; accepted or unknown, late, settle it
            in its own generation                 after all
==========  ====================================  ==========================================

That a refusal refunds although older generations were taken over rests on the ledger's promise: who
refuses a generation has seen that no older one was accepted, and lets none leave any more.

``at`` is the latest moment at which the message can have left: ``valid_until`` of its decision,
then the time of its outcome if that is earlier. Windows are judged by it and not by the moment of
decision, so that the cap holds for what *arrives*: a message decided at noon and sent ten minutes
later keeps a rolling day full until ten past twelve.

All here is in milliseconds since 1970, UTC, on the reservations of ``schemas.recipient_bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from schemas.reasons import Outcome
from schemas.recipient_bytes import Held, held
from schemas.records import CapRule, WhenCapped, WindowKind
from transforms.quiet_hours import DAY_MS, MINUTE_MS, window_ms

LONGEST_WINDOW = timedelta(days=31)
"""The longest rolling window that a rule may have; a calendar month is as long."""
RETENTION_MS = 33 * DAY_MS
"""How long a reservation that is not open is remembered: a month of 31 days, the hour that a
changing clock adds to it, and what a clock may be wrong."""
RECHECK_MS = 10 * MINUTE_MS
"""When to ask again if room can only come from a message whose outcome is overdue."""
SETTLED_TICK_MS = 10_000
"""Times of outcomes are rounded up to this, so that people of one page keep equal states."""

_COUNTS = frozenset({Outcome.ACCEPTED, Outcome.UNKNOWN})


class Window(NamedTuple):
    """A rule at one moment in one zone."""

    limit: int
    since_ms: int
    """A settled reservation counts if its ``at`` is later than this."""
    length_ms: int
    """Of a rolling window; zero for calendar windows."""
    ends_ms: int
    """Of a calendar window; zero for rolling ones."""
    channel: str | None
    category: str | None
    drops: bool


class Refusal(NamedTuple):
    """Why a cap refuses: for good, or until a moment at which its rules would admit."""

    drops: bool
    until_ms: int


def windows(
    rules: Sequence[CapRule], channel: str, category: str, zone: ZoneInfo, now_ms: int
) -> tuple[Window, ...]:
    """The windows that a message of this channel and category must find room in."""
    found = []
    for rule in rules:
        if rule.channel is not None and rule.channel.value != channel:
            continue
        if rule.category is not None and rule.category != category:
            continue
        length_ms = ends_ms = 0
        if rule.window is WindowKind.ROLLING:
            length_ms = rule.length // timedelta(milliseconds=1)
            since_ms = now_ms - length_ms
        else:
            since_ms, ends_ms = window_ms(rule.window, zone, now_ms)
        found.append(
            Window(
                rule.limit,
                since_ms,
                length_ms,
                ends_ms,
                None if rule.channel is None else rule.channel.value,
                rule.category,
                rule.when_capped is WhenCapped.DROP,
            )
        )
    return tuple(found)


def _counts(window: Window, one: Held) -> bool:
    return (
        not one.refunded
        and (not one.settled or one.at_ms > window.since_ms)
        and (window.channel is None or one.channel == window.channel)
        and (window.category is None or one.category == window.category)
    )


def refusal(
    required: Sequence[Window], reservations: Sequence[Held], run: str, leg: str, now_ms: int
) -> Refusal | None:
    """Whether one more message would pass a limit; None where all windows have room.

    The reservation of the message's own run and leg is left out: it is the same message. Room comes
    back at the end of a calendar window, or when enough reservations leave a rolling one, taking
    those still open for sent; where only overdue ones stand in the way, after ``RECHECK_MS``. If
    several rules refuse, one that drops decides, else the latest of their times.
    """
    if len(reservations) < min((window.limit for window in required), default=1):
        return None
    until_ms = 0
    drops = False
    for window in required:
        counted = [
            one
            for one in reservations
            if _counts(window, one) and not (one.run == run and one.leg == leg)
        ]
        if len(counted) < window.limit:
            continue
        if window.drops:
            drops = True
        if window.ends_ms:
            admits_ms = window.ends_ms
        else:
            leaves_ms = sorted(one.at_ms + window.length_ms for one in counted)
            admits_ms = leaves_ms[len(counted) - window.limit]
            if admits_ms <= now_ms:
                admits_ms = now_ms + RECHECK_MS
        until_ms = max(until_ms, admits_ms)
    if not until_ms:
        return None
    return Refusal(drops, until_ms)


def reserve(
    reservations: Sequence[Held],
    run: str,
    leg: str,
    generation: int,
    at_ms: int,
    channel: str,
    category: str,
    now_ms: int,
) -> tuple[Held, ...]:
    """The reservations after a message was admitted; one of its own run and leg is taken over.

    What was accepted or unknown before stays settled, and the later of two times stays: either
    message may be the one that arrives. An order older than the reservation changes no generation.
    """
    settled = False
    kept = []
    for one in reservations:
        if one.run == run and one.leg == leg:
            if not one.refunded:
                settled = one.settled
                at_ms = max(at_ms, one.at_ms)
            generation = max(generation, one.generation)
        elif is_remembered(one, now_ms):
            kept.append(one)
    kept.append(held(run, leg, generation, at_ms, channel, category, settled, False))
    return tuple(kept)


def is_remembered(one: Held, now_ms: int) -> bool:
    """Whether a reservation can still count in some window."""
    return one.at_ms > now_ms - RETENTION_MS or not (one.settled or one.refunded)


def resolve(
    reservations: tuple[Held, ...],
    run: str,
    leg: str,
    generation: int,
    outcome: Outcome,
    at_ms: int,
) -> tuple[Held, ...]:
    """The reservations after an outcome; the same object if it changes nothing.

    The order in which outcomes of a reservation come does not matter, nor how often they come:
    accepted and unknown settle it whatever their generation, other outcomes refund it if they are
    of its generation and it is not settled. An outcome without a reservation changes nothing:
    every message had one, so this one's left by age and can be in no window.
    """
    for position, one in enumerate(reservations):
        if one.run == run and one.leg == leg:
            resolved = _resolved(one, generation, outcome, at_ms)
            if resolved is one:
                return reservations
            return (*reservations[:position], resolved, *reservations[position + 1 :])
    return reservations


def _resolved(one: Held, generation: int, outcome: Outcome, at_ms: int) -> Held:
    if outcome in _COUNTS:
        left_ms = one.at_ms
        if generation >= one.generation:
            left_ms = min(left_ms, (at_ms // SETTLED_TICK_MS + 1) * SETTLED_TICK_MS)
        if one.settled and left_ms == one.at_ms:
            return one
        settled, refunded = True, False
    elif one.settled or one.refunded or generation != one.generation:
        return one
    else:
        left_ms, settled, refunded = one.at_ms, False, True
    return held(
        one.run,
        one.leg,
        one.generation,
        left_ms,
        one.channel,
        one.category,
        settled,
        refunded,
    )
