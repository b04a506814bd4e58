"""Consent: precedence of words, and words in any order."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec
from schemas.ids import RecipientId
from schemas.reasons import Reason
from schemas.records import ConsentChange, ConsentStatus
from schemas.state import RecipientState, Reservation
from tests.decide.people import EMAIL, NOON, TENANT, campaign, person
from transforms.consent import apply_consent, change_bytes, granted_by_snapshot
from transforms.decide import Admit, Skip, decide_one

GRANTED, WITHDRAWN = ConsentStatus.GRANTED, ConsentStatus.WITHDRAWN
SUPPRESSED, ERASED = ConsentStatus.SUPPRESSED, ConsentStatus.ERASED


def word(scope: str, status: ConsentStatus, minutes: int) -> ConsentChange:
    channel, topic = scope.split(":")
    return ConsentChange(
        change_id=f"{scope}-{minutes}",
        tenant=TENANT,
        recipient_id=RecipientId("ada"),
        channel=channel,
        topic=topic,
        status=status,
        at=NOON - timedelta(days=1) + timedelta(minutes=minutes),
        source="test",
    )


def after(words: list[ConsentChange]) -> RecipientState | None:
    state = None
    for one in words:
        state = apply_consent(state, one)
    return state


def said(words: list[ConsentChange], in_snapshot: bool = True) -> Reason | None:
    """Why e-mail about offers is refused."""
    consents = frozenset({"email:offers"}) if in_snapshot else frozenset({"sms:offers"})
    decision, _ = decide_one(after(words), person(consents=consents), campaign(), EMAIL, 0, NOON)
    if isinstance(decision, Skip):
        return decision.reason
    assert isinstance(decision, Admit)
    return None


@pytest.mark.parametrize(
    ("words", "in_snapshot", "reason"),
    [
        ([], True, None),
        ([], False, Reason.NO_CONSENT),
        ([word("email:offers", GRANTED, 0)], False, None),
        ([word("email:*", GRANTED, 0)], False, None),
        ([word("*:*", GRANTED, 0)], False, None),
        ([word("*:offers", GRANTED, 0)], False, None),
        ([word("sms:*", GRANTED, 0)], False, Reason.NO_CONSENT),
        ([word("email:news", WITHDRAWN, 0)], True, None),
        ([word("email:offers", WITHDRAWN, 0)], True, Reason.CONSENT_WITHDRAWN),
        ([word("*:*", WITHDRAWN, 0)], True, Reason.CONSENT_WITHDRAWN),
        # the latest of several scopes decides
        (
            [word("email:offers", GRANTED, 0), word("*:*", WITHDRAWN, 1)],
            True,
            Reason.CONSENT_WITHDRAWN,
        ),
        ([word("*:*", WITHDRAWN, 0), word("email:offers", GRANTED, 1)], True, None),
        ([word("email:offers", WITHDRAWN, 0), word("email:*", GRANTED, 1)], True, None),
        # of one moment the narrower
        ([word("email:*", WITHDRAWN, 0), word("email:offers", GRANTED, 0)], True, None),
        (
            [word("email:*", GRANTED, 0), word("email:offers", WITHDRAWN, 0)],
            True,
            Reason.CONSENT_WITHDRAWN,
        ),
        # a suppression holds until a later grant that covers the message
        ([word("email:*", SUPPRESSED, 0)], True, Reason.SUPPRESSED),
        ([word("sms:*", SUPPRESSED, 0)], True, None),
        (
            [word("email:*", SUPPRESSED, 1), word("email:offers", GRANTED, 0)],
            True,
            Reason.SUPPRESSED,
        ),
        (
            [word("email:*", SUPPRESSED, 1), word("email:offers", GRANTED, 1)],
            True,
            Reason.SUPPRESSED,
        ),
        ([word("email:*", SUPPRESSED, 1), word("email:news", GRANTED, 2)], True, Reason.SUPPRESSED),
        ([word("email:*", SUPPRESSED, 1), word("email:offers", GRANTED, 2)], True, None),
        ([word("email:*", SUPPRESSED, 1), word("email:*", GRANTED, 2)], True, None),
        # erased is final
        ([word("*:*", ERASED, 0), word("*:*", GRANTED, 5)], True, Reason.ERASED),
        ([word("sms:news", ERASED, 0), word("email:offers", GRANTED, 5)], True, Reason.ERASED),
    ],
)
def test_precedence_whatever_order_the_words_come_in(
    words: list[ConsentChange], in_snapshot: bool, reason: Reason | None
) -> None:
    for ordered in permutations(words):
        assert said([*ordered], in_snapshot) is reason
        assert said([*ordered, *ordered], in_snapshot) is reason


words_drawn = st.lists(
    st.builds(
        word,
        st.sampled_from(["email:offers", "email:*", "*:offers", "*:*", "sms:offers", "email:news"]),
        st.sampled_from(list(ConsentStatus)),
        st.integers(0, 3),
    ),
    max_size=7,
)


@given(words_drawn, st.randoms())
def test_words_may_come_in_any_order_and_often(words: list[ConsentChange], random: object) -> None:
    shuffled = [*words, *words[:3]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert after(shuffled) == after(words)


@given(words_drawn, st.booleans())
def test_nothing_is_sent_against_the_last_word(
    words: list[ConsentChange], in_snapshot: bool
) -> None:
    """An oracle that knows no ranks: a message needs a cause, and no later or equal objection."""
    covering = [
        one for one in words if one.channel in ("email", "*") and one.topic in ("offers", "*")
    ]
    allowed = said(words, in_snapshot) is None
    if any(one.status is ERASED for one in words):
        assert said(words, in_snapshot) is Reason.ERASED
        return
    if not covering:
        assert allowed is in_snapshot
        return
    latest = max(one.at for one in covering)
    last = {one.status for one in covering if one.at == latest}
    if SUPPRESSED in last:
        # one scope keeps its severest word of a moment, so a suppression is never lost to another
        assert said(words, in_snapshot) is Reason.SUPPRESSED
    elif last == {GRANTED}:
        assert allowed
    elif last == {WITHDRAWN}:
        assert said(words, in_snapshot) is Reason.CONSENT_WITHDRAWN


@given(words_drawn)
def test_bytes_and_records_agree(words: list[ConsentChange]) -> None:
    data: bytes | None = None
    for one in words:
        data = change_bytes(data, one) or data
    state = after(words)
    assert (None if data is None else codec.decode(data, RecipientState)) == state
    for one in words:
        assert data is not None
        assert change_bytes(data, one) is None


def test_an_erasure_leaves_nothing_of_the_person() -> None:
    held = Reservation(campaign().run, EMAIL, 0, NOON, "email", "promo", True)
    before = apply_consent(None, word("email:offers", GRANTED, 0))
    erased = apply_consent(replace(before, reservations=(held,)), word("email:*", ERASED, 1))
    assert erased.reservations == ()
    assert [(one.channel, one.topic, one.status) for one in erased.consents] == [("*", "*", ERASED)]
    assert apply_consent(erased, word("email:offers", GRANTED, 9)) is erased


@pytest.mark.parametrize("item", ["email:offers", "email:*", "*:offers", "*:*"])
def test_items_of_a_snapshot_that_grant(item: str) -> None:
    assert granted_by_snapshot(frozenset({item, "sms:x"}), "email", "offers")


@pytest.mark.parametrize("item", ["email:news", "sms:*", "email", "offers", "email:offer"])
def test_items_of_a_snapshot_that_do_not(item: str) -> None:
    assert not granted_by_snapshot(frozenset({item}), "email", "offers")
