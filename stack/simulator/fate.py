"""What becomes of an accepted message: a pure function of seed, send id and proportions.

Draws are slices of a hash, never a running random sequence, so that neither the order of the
requests nor a restart changes them and a test can name the recipient who will bounce.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from hashlib import blake2b
from struct import Struct

from stack.simulator.config import Rule, SimulatorConfig

_DRAWS = Struct("<16I")
_UNIT = 2.0**32


class EventKind(Enum):
    """SendGrid's names of events."""

    PROCESSED = "processed"
    DEFERRED = "deferred"
    DELIVERED = "delivered"
    BOUNCE = "bounce"
    DROPPED = "dropped"
    OPEN = "open"
    CLICK = "click"
    SPAM_REPORT = "spamreport"
    UNSUBSCRIBE = "unsubscribe"


@dataclass(frozen=True, slots=True)
class FateEvent:
    """An event, how long after acceptance it happens and, after it, when it is sent again.

    ``sent_after`` differs from ``after`` when the message's events are sent out of order;
    ``repeated_after`` is None unless the event is sent twice.
    """

    kind: EventKind
    after: timedelta
    sent_after: timedelta
    repeated_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Fate:
    """All events of one accepted message in the order in which they happen."""

    events: tuple[FateEvent, ...]
    blocked: bool = False

    def has(self, kind: EventKind) -> bool:
        """Whether an event of this kind is part of the fate."""
        return any(event.kind is kind for event in self.events)

    @property
    def delivered(self) -> bool:
        """Whether the message arrives."""
        return self.has(EventKind.DELIVERED)

    @property
    def bounced(self) -> bool:
        """Whether the message bounces."""
        return self.has(EventKind.BOUNCE)


def matching_rule(rules: tuple[Rule, ...], address: str) -> Rule | None:
    """The first rule whose pattern is found in the address."""
    for rule in rules:
        if re.search(rule.pattern, address):
            return rule
    return None


def draw(
    seed: int, send_id: str, config: SimulatorConfig, rule: Rule | None = None
) -> tuple[bool, tuple[tuple[EventKind, float, float, float], ...]]:
    """The numbers behind :func:`fate`: ``(blocked, ((kind, after_ms, sent_ms, again_ms), …))``.

    ``again_ms`` is negative when the event is sent once.
    """
    settings = config.webhooks
    chance = settings.proportions
    digest = blake2b(b"%d:%b" % (seed, send_id.encode())).digest()
    (
        end, block, defer, engaged, spam, gone, disorder, duplicate,
        wait1, wait2, wait3, wait4, wait5, wait6, wait7, again,
    ) = [value / _UNIT for value in _DRAWS.unpack(digest)]  # fmt: skip
    forced = rule.action if rule is not None and rule.action != "reject" else None
    kinds: list[EventKind] = []
    if settings.processed:
        kinds.append(EventKind.PROCESSED)
    if forced == "bounce" or (
        forced is None and chance.delivered <= end < chance.delivered + chance.bounce
    ):
        kinds.append(EventKind.BOUNCE)
    elif forced == "dropped" or (
        forced is None
        and chance.delivered + chance.bounce
        <= end
        < chance.delivered + chance.bounce + chance.dropped
    ):
        kinds = [EventKind.DROPPED]
    elif forced is not None or end < chance.delivered:
        if defer < chance.deferred:
            kinds.append(EventKind.DEFERRED)
        kinds.append(EventKind.DELIVERED)
        # One draw for both: who clicks is among those who open.
        if engaged < max(chance.open, chance.click):
            kinds.append(EventKind.OPEN)
        if engaged < chance.click:
            kinds.append(EventKind.CLICK)
        if forced == "spamreport" or spam < chance.spamreport:
            kinds.append(EventKind.SPAM_REPORT)
        if forced == "unsubscribe" or gone < chance.unsubscribe:
            kinds.append(EventKind.UNSUBSCRIBE)
    low, span = settings.min_delay_ms, settings.max_delay_ms - settings.min_delay_ms
    waits = (wait1, wait2, wait3, wait4, wait5, wait6, wait7)
    times: list[float] = []
    at = 0.0
    for index in range(len(kinds)):
        # The first event of a message is quick, the later ones follow within the given delay.
        at += low + span * waits[index] if index or kinds[0] is not EventKind.PROCESSED else low
        times.append(at)
    sent = times[::-1] if disorder < settings.disorder_rate else times
    repeated = -1
    if kinds and settings.duplicate_rate:
        # Each event is drawn alone: its position shifts the common draw round the unit circle.
        return block < chance.blocked, tuple(
            (
                kind,
                times[i],
                sent[i],
                sent[i] + low + span * again
                if (duplicate + i * 0.381966) % 1.0 < settings.duplicate_rate
                else repeated,
            )
            for i, kind in enumerate(kinds)
        )
    return block < chance.blocked, tuple(
        (kind, times[i], sent[i], repeated) for i, kind in enumerate(kinds)
    )


def fate(seed: int, send_id: str, config: SimulatorConfig, address: str = "") -> Fate:
    """The fate of a message, the same for ever for the same seed, id and proportions.

    ``address`` matters only where rules by address are configured; SendGrid's rules are used.
    """
    blocked, events = draw(seed, send_id, config, matching_rule(config.sendgrid.rules, address))
    return Fate(
        tuple(
            FateEvent(
                kind,
                timedelta(milliseconds=after),
                timedelta(milliseconds=sent),
                None if again < 0 else timedelta(milliseconds=again),
            )
            for kind, after, sent, again in events
        ),
        blocked,
    )
