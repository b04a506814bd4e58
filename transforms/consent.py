"""Consent: who may be sent what, by the person's latest word.

Precedence, from the strongest:

1. **Erased** wins always, whatever its scope and time. All else that was known is forgotten.
2. Of the words of the consent stream whose scope covers the message (channel equal or ``*``, topic
   equal or ``*``) **the latest** decides, whatever its scope: a later 'nothing at all' ends an
   earlier 'offers by e-mail', and a later grant of all e-mail ends an earlier withdrawal of a
   topic. Of words of one moment a suppression decides, then the narrower scope (channel and topic,
   channel, topic, neither), then the severer status.
   A suppression therefore holds on its channel until a *later* grant that covers the message.
3. Without such a word the **snapshot** decides: an item ``channel:topic`` or ``channel:*``. A word
   of the stream outranks a snapshot whatever its date: a list bought or merged anew must not undo
   an unsubscription.
4. Otherwise there is no consent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from schemas import recipient_bytes
from schemas.codec import to_millis
from schemas.reasons import Reason
from schemas.recipient_bytes import Memory, Word
from schemas.records import ConsentChange, ConsentStatus
from schemas.state import RecipientState
from transforms.ledger import OPT_OUT_MEMORY_MS

ANY = "*"
_OPT_OUT_MEMORY = timedelta(milliseconds=OPT_OUT_MEMORY_MS)
_SEVERITY = {
    ConsentStatus.GRANTED: 0,
    ConsentStatus.WITHDRAWN: 1,
    ConsentStatus.SUPPRESSED: 2,
    ConsentStatus.ERASED: 3,
}
_REFUSALS = {
    ConsentStatus.GRANTED: None,
    ConsentStatus.WITHDRAWN: Reason.CONSENT_WITHDRAWN,
    ConsentStatus.SUPPRESSED: Reason.SUPPRESSED,
    ConsentStatus.ERASED: Reason.ERASED,
}


def granted_by_snapshot(consents: Iterable[str], channel: str, topic: str) -> bool:
    """Whether a snapshot's items hold consent to a channel and topic."""
    accepted = {f"{channel}:{topic}", f"{channel}:{ANY}", f"{ANY}:{topic}", f"{ANY}:{ANY}"}
    return not accepted.isdisjoint(consents)


def refusal(words: Sequence[Word], in_snapshot: bool, channel: str, topic: str) -> Reason | None:
    """Why a message may not be sent; None where it may."""
    best: tuple[int, bool, int, int] | None = None
    status = None
    for word in words:
        if word.status is ConsentStatus.ERASED:
            return Reason.ERASED
        same_channel, same_topic = word.channel == channel, word.topic == topic
        if not (same_channel or word.channel == ANY) or not (same_topic or word.topic == ANY):
            continue
        rank = (
            word.at_ms,
            word.status is ConsentStatus.SUPPRESSED,
            2 * same_channel + same_topic,
            _SEVERITY[word.status],
        )
        if best is None or rank > best:
            best, status = rank, word.status
    if status is not None:
        return _REFUSALS[status]
    return None if in_snapshot else Reason.NO_CONSENT


def _after(words: tuple[Word, ...], change: Word) -> tuple[Word, ...]:
    for word in words:
        if word.status is ConsentStatus.ERASED:
            if change.status is ConsentStatus.ERASED and change.at_ms > word.at_ms:
                return (Word(ANY, ANY, change.status, change.at_ms),)
            return words
    if change.status is ConsentStatus.ERASED:
        return (Word(ANY, ANY, change.status, change.at_ms),)
    scope = change.channel, change.topic
    for word in words:
        if (word.channel, word.topic) == scope and (word.at_ms, _SEVERITY[word.status]) >= (
            change.at_ms,
            _SEVERITY[change.status],
        ):
            return words
    others = [word for word in words if (word.channel, word.topic) != scope]
    return tuple(sorted((*others, change), key=lambda word: (word.channel, word.topic)))


def change_memory(memory: Memory | None, change: ConsentChange) -> Memory:
    """A recipient's memory after a consent change; see ``apply_consent``."""
    word = Word(change.channel, change.topic, change.status, to_millis(change.at))
    if memory is None:
        return recipient_bytes.memory(change.tenant, _after((), word), ())
    words = _after(memory.words, word)
    if words is memory.words:
        return memory
    erased = change.status is ConsentStatus.ERASED
    return recipient_bytes.memory(memory.tenant, words, () if erased else memory.held)


def apply_consent(state: RecipientState | None, change: ConsentChange) -> RecipientState:
    """A recipient's state after a consent change, in whatever order and however often it comes.

    The latest word of each scope is kept, of two of one moment the severer. An erasure leaves
    nothing but itself: no consent, no reservation, and nothing is remembered after it.
    """
    before = None if state is None else recipient_bytes.from_state(state)
    after = change_memory(before, change)
    if after is before and state is not None:
        return state
    return recipient_bytes.to_state(after)


def change_bytes(data: bytes | None, change: ConsentChange) -> bytes | None:
    """``apply_consent`` on a state's bytes; None if nothing changes."""
    before = None if data is None else recipient_bytes.read(data)
    after = change_memory(before, change)
    return None if after is before else recipient_bytes.write(after)


def _covers(channel: str, topic: str, word: Word | ConsentChange) -> bool:
    return channel in (ANY, word.channel) and topic in (ANY, word.topic)


def for_claims(after: bytes, change: ConsentChange, now: datetime) -> tuple[ConsentChange, ...]:
    """What claims must be told of a change that has led to the state ``after``: one a scope.

    Each is of exactly one scope, so that of several the latest of a scope is all that counts. A
    withdrawal is told as itself (an erasure withdraws all), unless a later grant covers it or it is
    older than what claims remember. A grant takes back its own scope, and each scope that it covers
    and that was withdrawn before it; a wider or later withdrawal stands.
    """
    if forgotten_by_claims(change, now):
        return ()
    if change.status is ConsentStatus.ERASED:
        return (replace(change, channel=ANY, topic=ANY),)
    words = recipient_bytes.read(after).words
    at_ms = to_millis(change.at)
    if change.status is ConsentStatus.GRANTED:
        covered = [
            (word.channel, word.topic)
            for word in words
            if word.status is not ConsentStatus.GRANTED
            and word.at_ms < at_ms
            and _covers(change.channel, change.topic, word)
        ]
        return (
            change,
            *(replace(change, channel=channel, topic=topic) for channel, topic in covered),
        )
    granted_since = any(
        word.status is ConsentStatus.GRANTED
        and word.at_ms > at_ms
        and _covers(word.channel, word.topic, change)
        for word in words
    )
    return () if granted_since else (change,)


def forgotten_by_claims(change: ConsentChange, now: datetime) -> bool:
    """Whether claims need not be told of it any more: what it withdrew is decided as withdrawn."""
    return change.status is not ConsentStatus.GRANTED and now - change.at >= _OPT_OUT_MEMORY
