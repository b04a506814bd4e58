"""Pages: the same decisions as one by one, nobody left out, nobody twice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import codec
from schemas.errors import IncompatibleState, InvalidCampaign, MalformedRecord
from schemas.ids import LegId, RecipientId, RunId
from schemas.pages import PAGE_SIZE, bitmap_bytes, bitmap_from, full_bitmap, indexes_of
from schemas.reasons import Channel, Lane, Outcome, Reason
from schemas.records import (
    ConsentStatus,
    OutcomeGroup,
    Outcomes,
    QuietHours,
    WhenCapped,
    WhenZoneUnknown,
    WindowKind,
)
from schemas.snapshot import PageIndex
from schemas.state import ConsentEntry, RecipientState, Reservation
from tests.decide.people import EMAIL, NOON, TENANT, campaign, cap, order, page_of, person
from transforms.decide import (
    Admit,
    Defer,
    PageDecision,
    Person,
    Skip,
    decide_one,
    decide_page,
    defer_page,
    fold_outcome,
    fold_page_outcomes,
    skip_page,
    state_key,
)

MINUTE = timedelta(minutes=1)

entries = st.builds(
    ConsentEntry,
    st.sampled_from(["email", "*"]),
    st.sampled_from(["offers", "*"]),
    st.sampled_from([ConsentStatus.GRANTED, ConsentStatus.WITHDRAWN, ConsentStatus.SUPPRESSED]),
    st.sampled_from([NOON - MINUTE, NOON - 2 * MINUTE]),
)
reservations = st.builds(
    Reservation,
    st.sampled_from([RunId("spring-1"), RunId("winter-1"), RunId("winter-2")]),
    st.just(EMAIL),
    st.integers(0, 3),
    st.sampled_from([NOON - timedelta(days=days) for days in (0, 1, 6, 40)]),
    st.just("email"),
    st.sampled_from(["promo", "news"]),
    st.booleans(),
    st.booleans(),
).filter(lambda one: not (one.settled and one.refunded))
states_drawn = st.one_of(
    st.none(),
    st.builds(
        RecipientState,
        st.just(TENANT),
        st.lists(entries, max_size=2, unique_by=lambda one: (one.channel, one.topic)).map(tuple),
        st.lists(reservations, max_size=3, unique_by=lambda one: one.run).map(tuple),
    ),
)
people_drawn = st.lists(
    st.tuples(
        st.sampled_from(["Europe/Berlin", "Asia/Tokyo", "America/New_York", ""]),
        st.sampled_from([frozenset({"email:offers"}), frozenset({"sms:*"}), frozenset()]),
        st.sampled_from([0, 1, 3, 6]),
        states_drawn,
        st.booleans(),
    ),
    max_size=25,
)
specs_drawn = st.builds(
    campaign,
    deadline=st.sampled_from([NOON, NOON + 5 * MINUTE, NOON + timedelta(days=2)]),
    holdout_percent=st.sampled_from([0.0, 0.0, 50.0]),
    quiet_hours=st.sampled_from([None, QuietHours(21 * 60, 8 * 60), QuietHours(0, 8 * 60)]),
    when_zone_unknown=st.just(WhenZoneUnknown.ASSUME),
    fallback_zone=st.sampled_from(["Asia/Tokyo", "UTC"]),
    start_at=st.sampled_from([None, None, NOON + MINUTE]),
    caps=st.lists(
        st.builds(
            cap,
            st.integers(1, 2),
            st.sampled_from([timedelta(hours=36), *list(WindowKind)[1:]]),
            st.sampled_from([None, Channel.EMAIL]),
            st.sampled_from([None, "promo"]),
            st.sampled_from(list(WhenCapped)),
        ),
        max_size=2,
    ).map(tuple),
)


def parts_of(decided: PageDecision) -> dict[int, object]:
    """The decision of each index, as ``decide_one`` says it; fails if one has two."""
    found: dict[int, object] = {}

    def say(ordinals: bytes, decision: object) -> None:
        assert ordinals
        assert ordinals[-1], "bitmaps are in their shortest form"
        for i in indexes_of(bitmap_from(ordinals)):
            assert i not in found
            found[i] = decision

    for send in decided.sends:
        say(send.ordinals, Admit(send.valid_until))
    sent = sum(bitmap_from(send.ordinals) for send in decided.sends)
    assert bitmap_from(decided.result.sends) == sent
    for skip in decided.result.skips:
        say(skip.ordinals, Skip(skip.reason, skip.expired))
    for deferral in decided.result.deferrals:
        say(deferral.ordinals, Defer(deferral.until, deferral.reason))
    return found


@given(people_drawn, specs_drawn, st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_a_page_is_decided_as_its_people_one_by_one(people, spec, generation) -> None:  # type: ignore[no-untyped-def]
    persons = [
        Person(RecipientId(f"p{i}"), zone, consents, flags)
        for i, (zone, consents, flags, _, _) in enumerate(people)
    ]
    states = {f"p{i}": one[3] for i, one in enumerate(people)}
    data = {name: codec.encode(one) for name, one in states.items() if one is not None}
    wanted = [i for i, one in enumerate(people) if one[4]]
    asked = order(spec, wanted, generation=generation)
    decided = decide_page(asked, spec, page_of(persons), data.get, NOON)

    expected = {}
    expected_states = {}
    for i in wanted:
        name = persons[i].recipient_id
        expected[i], after = decide_one(states[name], persons[i], spec, EMAIL, generation, NOON)
        if after is not states[name]:
            expected_states[name] = after
    assert parts_of(decided) == expected
    assert {
        name: codec.decode(one, RecipientState) for name, one in decided.states.items()
    } == expected_states
    for send in decided.sends:
        assert codec.decode(codec.encode(send), type(send)) == send
    assert codec.decode(codec.encode(decided.result), type(decided.result)) == decided.result


@given(people_drawn, specs_drawn, st.sampled_from(list(Outcome)), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_outcomes_of_a_page_are_folded_as_one_by_one(people, spec, outcome, generation) -> None:  # type: ignore[no-untyped-def]
    persons = [person(recipient_id=RecipientId(f"p{i}")) for i in range(len(people))]
    states = {f"p{i}": one[3] for i, one in enumerate(people) if one[3] is not None}
    data = {name: codec.encode(one) for name, one in states.items()}
    at = NOON + MINUTE
    half = len(people) // 2
    outcomes = told(
        [
            (outcome, generation, tuple(range(len(people) + 2))),
            (Outcome.ACCEPTED, generation, tuple(range(half))),
        ],
        at,
    )
    updates = fold_page_outcomes(outcomes, page_of(persons), data.get)
    for i in range(len(people)):
        before = states.get(f"p{i}")
        after = fold_outcome(before, outcomes.run, EMAIL, generation, outcome, at)
        if i < half:
            after = fold_outcome(after, outcomes.run, EMAIL, generation, Outcome.ACCEPTED, at)
        if after == before:
            assert f"p{i}" not in updates
        else:
            assert codec.decode(updates[f"p{i}"], RecipientState) == after
    again = fold_page_outcomes(outcomes, page_of(persons), (data | updates).get)
    assert again == {}


def told(groups: list[tuple[Outcome, int, tuple[int, ...]]], at: datetime) -> Outcomes:
    spec = campaign()
    return Outcomes(
        tenant=spec.tenant,
        run=spec.run,
        leg=EMAIL,
        snapshot=spec.snapshot,
        shard=7,
        page=3,
        at=at,
        groups=tuple(
            OutcomeGroup(outcome, Reason.PROVIDER_ACCEPTED, "smtp", generation, indexes)
            for outcome, generation, indexes in groups
        ),
    )


def people(count: int, zone: str = "Europe/Berlin") -> list[Person]:
    return [person(recipient_id=RecipientId(f"{zone}-{i}"), zone=zone) for i in range(count)]


def test_a_send_says_all_that_delivery_needs() -> None:
    spec = campaign()
    asked = order(spec, range(3), generation=2)
    decided = decide_page(asked, spec, page_of(people(3)), {}.get, NOON)
    (send,) = decided.sends
    assert (send.tenant, send.run, send.leg, send.lane) == (
        TENANT,
        spec.run,
        EMAIL,
        Lane.PROMOTIONAL,
    )
    assert (send.channel, send.spec, send.snapshot) == (Channel.EMAIL, asked.spec, spec.snapshot)
    assert (send.shard, send.page, send.generation, send.ordinals) == (7, 3, 2, b"\x07")
    assert (send.decided_at, send.valid_until, send.deadline) == (
        NOON,
        NOON + 10 * MINUTE,
        spec.deadline,
    )
    result = decided.result
    assert (result.generation, result.ordered_at, result.decided_at) == (2, NOON, NOON)
    assert result.sends == b"\x07"


def test_zones_of_a_page_with_other_quiet_hours_go_in_sends_of_their_own() -> None:
    """At 19:55 UTC it is five to nine in Berlin and five to eight in London."""
    now = datetime(2026, 3, 10, 19, 55, tzinfo=UTC)
    spec = campaign(quiet_hours=QuietHours(21 * 60, 8 * 60))
    both = [*people(3), *people(2, "Europe/London")]
    decided = decide_page(order(spec, range(5)), spec, page_of(both), {}.get, now)
    assert [(send.valid_until, send.ordinals) for send in decided.sends] == [
        (now + 5 * MINUTE, b"\x07"),
        (now + 10 * MINUTE, b"\x18"),
    ]


def test_a_full_page_of_people_alike_is_one_state_and_one_send() -> None:
    spec = campaign(caps=(cap(1, timedelta(days=1)),))
    asked = order(spec, range(PAGE_SIZE))
    decided = decide_page(asked, spec, page_of(people(PAGE_SIZE)), {}.get, NOON)
    assert len(decided.sends) == 1
    assert len(decided.states) == PAGE_SIZE
    assert len({id(one) for one in decided.states.values()}) == 1


def test_deciding_an_order_again_says_the_same() -> None:
    spec = campaign(caps=(cap(1, timedelta(days=1)),))
    asked = order(spec, range(20))
    first = decide_page(asked, spec, page_of(people(20)), {}.get, NOON)
    again = decide_page(asked, spec, page_of(people(20)), first.states.get, NOON)
    assert again == first


def test_ordinals_that_the_page_lacks_are_skipped_and_named() -> None:
    spec = campaign()
    decided = decide_page(order(spec, [1, 2, 9]), spec, page_of(people(2)), {}.get, NOON)
    assert parts_of(decided) == {
        1: Admit(NOON + 10 * MINUTE),
        2: Skip(Reason.CORRUPT_PAGE),
        9: Skip(Reason.CORRUPT_PAGE),
    }


def test_an_empty_order_is_an_empty_result() -> None:
    spec = campaign()
    decided = decide_page(order(spec, []), spec, page_of(people(2)), {}.get, NOON)
    assert (decided.sends, decided.states, decided.result.sends) == ((), {}, b"")
    assert (decided.result.skips, decided.result.deferrals) == ((), ())


def test_a_damaged_page_is_skipped_whole() -> None:
    spec = campaign()
    asked = order(spec, [0, 3, 499], generation=5)
    result = skip_page(asked, Reason.CORRUPT_PAGE, NOON)
    assert [(one.reason, one.ordinals, one.expired) for one in result.skips] == [
        (Reason.CORRUPT_PAGE, asked.ordinals, False)
    ]
    assert (result.generation, result.sends, result.deferrals) == (5, b"", ())
    assert skip_page(order(spec, []), Reason.CORRUPT_PAGE, NOON).skips == ()


def test_a_page_of_a_missing_snapshot_is_put_off_whole() -> None:
    spec = campaign()
    asked = order(spec, [0, 3, 499], generation=5)
    for second, until in ((0, 15), (1, 30), (15, 30), (16, 45)):
        result = defer_page(asked, Reason.MISSING_SNAPSHOT, NOON + timedelta(seconds=second))
        assert [(one.reason, one.until, one.ordinals) for one in result.deferrals] == [
            (Reason.MISSING_SNAPSHOT, NOON + timedelta(seconds=until), asked.ordinals)
        ]
        assert (result.generation, result.sends, result.skips) == (5, b"", ())
    assert defer_page(order(spec, []), Reason.MISSING_SNAPSHOT, NOON).deferrals == ()


def test_a_snapshots_own_page_is_decided() -> None:
    index = PageIndex(
        first_ordinal=1500,
        recipient_ids=["ada", "bob"],
        zones=["", "Europe/Berlin"],
        consent_sets=(frozenset({"email:offers"}), frozenset()),
        consent_index=[0, 1],
        flags=b"\x01\x01",
    )
    spec = campaign()
    decided = decide_page(order(spec, range(2)), spec, index, {}.get, NOON)
    assert parts_of(decided) == {0: Admit(NOON + 10 * MINUTE), 1: Skip(Reason.NO_CONSENT)}


def test_a_state_that_does_not_decode_is_told_loudly() -> None:
    spec = campaign()
    good = codec.encode(RecipientState(TENANT, (), ()))
    for data, error in (
        (good[:-1], MalformedRecord),
        (good + b"\0", MalformedRecord),
        (good[:2] + b"\1" * 8 + good[10:], IncompatibleState),
        (b"", MalformedRecord),
    ):
        with pytest.raises(error):
            decide_page(order(spec, [0]), spec, page_of(people(1)), lambda _, data=data: data, NOON)


def test_an_order_of_a_leg_that_the_campaign_lacks_is_refused() -> None:
    spec = campaign()
    asked = order(spec, [0], leg=LegId("push"))
    with pytest.raises(InvalidCampaign):
        decide_page(asked, spec, page_of(people(1)), {}.get, NOON)


def test_state_keys_of_two_tenants_differ() -> None:
    assert state_key(TENANT, "b") != state_key(type(TENANT)("acm"), "eb")
    assert state_key(TENANT, "") + "b" == state_key(TENANT, "b")


def test_bitmaps_of_large_pages() -> None:
    spec = campaign()
    asked = order(spec, range(PAGE_SIZE))
    assert asked.ordinals == bitmap_bytes(full_bitmap(PAGE_SIZE))
    result = decide_page(asked, spec, page_of(people(PAGE_SIZE)), {}.get, NOON).result
    assert result.sends == asked.ordinals
